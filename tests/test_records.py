"""Records survive disk, kills and each other; what is none is refused with a sentence."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from attnc.errors import ArtifactError
from attnc.records import Record, RecordKey, Records, Timing, best_of

KEY = RecordKey("attention B=4 H=32 L=1024 causal", "h100", "bfloat16", "ab12" * 8, "0.3.0", "3.7.1")
TIMINGS = {
    "flash{block_m=128,warps=4}": Timing(1e-3, 1.1e-3),
    "flash{block_m=64,warps=4}": Timing(9e-4, 1.0e-3, 1.05e-3, 0.01),
    "flash{block_m=256,warps=8}": Timing(8e-4, failure="flash{block_m=256}: 300 KB of shared memory; leave it out."),
}
DEFAULT = next(iter(TIMINGS))
RECORD = Record(KEY, DEFAULT, TIMINGS, {"B": 4, "L": 1024}, 7, "2026-01-31T12:00:00+00:00")


def test_a_record_round_trips() -> None:
    again = Record.from_json(RECORD.to_json())
    assert again == RECORD and again.date == RECORD.date and again.timings == RECORD.timings


def test_the_best_is_compared_at_the_dearest_fidelity_of_the_default() -> None:
    assert RECORD.best == "flash{block_m=64,warps=4}"
    slower = TIMINGS | {DEFAULT: Timing(1e-3, 1.1e-3, 1.0e-3, 0.0)}
    assert best_of(slower, DEFAULT) == DEFAULT, "measured, the default is faster"


@pytest.mark.parametrize(
    ("timings", "best"),
    [
        ({"a": Timing(2.0), "b": Timing(2.0)}, "a"),
        ({"a": Timing(2.0), "b": Timing(1.999)}, "b"),
        ({"a": Timing(2.0), "b": Timing(1.0, failure="no.")}, "a"),
        ({"a": Timing(2.0, failure="no."), "b": Timing(3.0)}, "b"),
        ({"a": Timing(2.0, failure="no."), "b": Timing(3.0, failure="no.")}, None),
        ({"a": Timing(measured_s=1.0, error=0.02), "b": Timing(measured_s=0.985, error=0.0)}, "a"),
        ({"a": Timing(measured_s=1.0, error=0.02), "b": Timing(measured_s=0.97, error=0.0)}, "b"),
        ({"a": Timing(measured_s=1.0), "b": Timing(measured_s=0.98, error=0.5), "c": Timing(measured_s=0.99)}, "c"),
    ],
)
def test_ties_and_differences_within_the_spread_go_to_the_default(timings: dict[str, Timing], best: str | None) -> None:
    assert best_of(timings, "a") == best


# Strict reading.


def mutated(rng: random.Random, text: str) -> str | bytes:
    """A record file after a mishap or with malice."""
    junk = [None, True, -1, 0, 1e300, 10**400, "", "x" * 9999, [], {}, "\ud800", "../../etc", "__import__('os')", 1.5]

    def damage(value: object) -> object:
        if isinstance(value, dict) and value and rng.random() < 0.8:
            name = rng.choice(sorted(value))
            out = dict(value)
            how = rng.random()
            if how < 0.15:
                del out[name]
            elif how < 0.3:
                out[rng.choice(["extra", name + "x", ""])] = out[name]
            elif how < 0.4:
                out[name] = rng.choice(junk)
            else:
                out[name] = damage(out[name])
            return out
        return rng.choice(junk)

    how = rng.randrange(8)
    if how == 0:
        return text[: rng.randrange(len(text))]
    if how == 1:
        raw = bytearray(text.encode())
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw)
    if how == 2:
        return text.replace(rng.choice(["1e-03", "0.001", "1024"]), rng.choice(["NaN", "-Infinity", "1e999", "0x1"]))
    if how == 3:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["[" * 100000, '{"a":' * 50000, "\0", ",", '"', text]) + text[at:]
    return json.dumps(damage(json.loads(text)))


def refusal(text: str | bytes) -> str | None:
    """The sentence with which a text is refused; None where it holds a valid record."""
    try:
        found = Record.from_json(text, "h100.json")
    except ArtifactError as exc:
        return str(exc)
    assert found.best is None or found.best in found.timings
    assert Record.from_json(found.to_json()) == found
    return None


def test_four_hundred_mutated_files_each_give_a_sentence_or_a_record() -> None:
    rng = random.Random(0)
    sentences = [refusal(mutated(rng, RECORD.to_json())) for _ in range(400)]
    refused = [s for s in sentences if s is not None]
    assert len(refused) > 300
    for sentence in refused:
        assert sentence.startswith("read h100.json: found ") and "allowed is" in sentence and len(sentence) < 9000


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("seed", True, "whole number"),
        ("seed", -1, "whole number"),
        ("best", "flash{block_m=128,warps=4}", "follows from its timings"),
        ("attnc_record", 2, "version"),
        ("attnc_record", True, "version"),
        ("date", "yesterday", "date"),
        ("default", "flash{block_m=__import__('os')}", "default"),
        ("timings", {"a": {"compiled_s": 1e9}}, "number from"),
        ("timings", {"a": {"compiled_s": "1"}}, "number from"),
        ("timings", {"a": {"colour": 1}}, "colour"),
    ],
)
def test_a_wrong_value_is_named(where: str, value: object, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        Record.from_json(json.dumps(json.loads(RECORD.to_json()) | {where: value}))


# Keeping.


def test_what_two_searches_found_is_merged(tmp_path: Path) -> None:
    one = replace(RECORD, timings={DEFAULT: Timing(1e-3, 2e-3), "a": Timing(1e-3, measured_s=1.0, error=0.1)})
    two = replace(RECORD, timings={"a": Timing(1e-3, measured_s=1.1, error=0.2), "b": Timing(1e-3, failure="no.")})
    both = Records(tmp_path).put(one) and Records(tmp_path).put(two)
    assert both.timings == {
        DEFAULT: Timing(1e-3, 2e-3),
        "a": Timing(1e-3, measured_s=1.1, error=0.2),
        "b": Timing(1e-3, failure="no."),
    }
    assert Records(tmp_path).find(KEY) == both
    undone = Records(tmp_path).put(replace(one, timings={"b": Timing(1e-3, 1e-3)}))
    assert undone.timings["b"].failure == "no.", "a failure is never forgotten"


@pytest.mark.parametrize("date", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_a_clock_that_is_wrong_changes_nothing(tmp_path: Path, date: str) -> None:
    Records(tmp_path).put(replace(RECORD, date=date))
    later = Records(tmp_path).put(replace(RECORD, timings={"a": Timing(1e-4)}))
    assert later.timings == {**TIMINGS, "a": Timing(1e-4)}
    os.utime(tmp_path / KEY.file, (4e9, 4e9))
    assert Records(tmp_path).find(KEY) == later


@pytest.mark.parametrize("part", ["attnc", "triton", "kernel"])
def test_a_record_of_another_version_is_reported_and_not_used(tmp_path: Path, caplog, part: str) -> None:
    Records(tmp_path).put(RECORD)
    other = replace(KEY, **{part: "9.9"})
    with caplog.at_level(logging.WARNING):
        assert Records(tmp_path).find(other) is None
    assert "not used" in caplog.text and "Triton 3.7.1" in caplog.text
    assert Records(tmp_path).find(replace(KEY, device="a100")) is None
    assert len(caplog.records) == 1, "of another device nothing is said"


def test_a_broken_record_is_set_aside_and_written_anew(tmp_path: Path, caplog) -> None:
    file = tmp_path / KEY.file
    file.write_text("{")
    records = Records(tmp_path)
    assert records.find(KEY) is None and "no JSON" in caplog.text
    assert records.put(RECORD) == RECORD and Records(tmp_path).find(KEY) == RECORD
    assert file.with_suffix(".broken").read_text() == "{"


def test_a_file_under_another_key_is_not_used(tmp_path: Path, caplog) -> None:
    (tmp_path / replace(KEY, device="a100").file).write_text(RECORD.to_json())
    assert Records(tmp_path).find(replace(KEY, device="a100")) is None and "found a record of" in caplog.text


def test_a_folder_that_cannot_be_written_warns_once_and_keeps_results(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    records = Records(tmp_path / "file" / "records")
    records.put(RECORD)
    merged = records.put(replace(RECORD, timings={"a": Timing(1e-4)}))
    assert records.find(KEY) == merged and set(merged.timings) == {*TIMINGS, "a"}
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_full_disk_leaves_the_old_record_and_keeps_the_new_one(tmp_path: Path, caplog, monkeypatch) -> None:
    records = Records(tmp_path)
    records.put(RECORD)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    records.put(replace(RECORD, timings={"a": Timing(1e-4)}))
    assert set(records.find(KEY).timings) == {*TIMINGS, "a"} and "No space left" in caplog.text
    assert Records(tmp_path).find(KEY) == RECORD
    assert not list(tmp_path.glob("*.tmp"))


WRITER = """
import sys
from attnc.records import Record, RecordKey, Records, Timing
key = RecordKey("attention", "h100", "bfloat16", "ab12", "0.3.0", "3.7.1")
name, count = sys.argv[2], int(sys.argv[3])
for i in range(count):
    Records(sys.argv[1]).put(Record(key, "d", {f"{name}{{a={i}}}": Timing(1e-3, 2e-3)}))
    print(i, flush=True)
"""


def writer(folder: Path, name: str, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)


def test_two_processes_that_write_one_key_lose_nothing(tmp_path: Path) -> None:
    running = [writer(tmp_path, name, 25) for name in ("x", "y")]
    assert [process.wait(60) for process in running] == [0, 0]
    found = Records(tmp_path).find(RecordKey("attention", "h100", "bfloat16", "ab12", "0.3.0", "3.7.1"))
    assert found is not None and len(found.timings) == 50


def test_a_killed_writer_leaves_a_whole_record_and_no_lock(tmp_path: Path) -> None:
    process = writer(tmp_path, "x", 10000)
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    time.sleep(random.Random(0).random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    key = RecordKey("attention", "h100", "bfloat16", "ab12", "0.3.0", "3.7.1")
    found = Records(tmp_path).find(key)
    assert found is not None and len(found.timings) >= 20
    began = time.monotonic()
    assert len(Records(tmp_path).put(Record(key, "d", {"y": Timing(1e-3)})).timings) > 20
    assert time.monotonic() - began < 5
