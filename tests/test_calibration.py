"""A calibration's file: it reads back as it was, and whatever else it holds is named in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnc.calibration import Calibration, Judged, Measured, RegionErrors, resumed
from attnc.errors import ArtifactError, UsageError

SETTING = "sliding_window{window=8,dilation=1}"


def made(**given) -> Calibration:
    measured = Measured(1e-3)
    for error in (0.1, 0.3):
        measured.add(Judged(error, 2 * error, 0.5, 0.25))
    measured.add_run(0.05, 0.01)
    region = RegionErrors(
        "attention-0", "layers.0 attention", 2e-3, {SETTING: measured, "low_rank{rank=8}": Measured(1)}
    )
    parts = {"model": "Model", "device": "cpu", "pairs": 8, "regions": {"": region}, "digests": ["0" * 16, "1" * 16]}
    return Calibration(**{**parts, **given})


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    made().save(tmp_path / "errors.json")
    assert Calibration.load(tmp_path / "errors.json") == made()


def test_what_is_counted_is_the_worst_and_the_mean() -> None:
    measured = made().regions[""].settings[SETTING]
    assert (measured.batches, measured.error, measured.row) == (2, 0.3, 0.6)
    assert measured.mean_error == pytest.approx(0.2)
    measured.add_run(0.02, 0.03)
    assert (measured.runs, measured.output, measured.worst_kl) == (2, 0.05, 0.03)
    assert measured.kl == pytest.approx(0.02)


def edited(*path: object, value: object) -> str:
    content = json.loads(made().to_json())
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(content)


AT = ("regions", "", "settings", SETTING)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found no JSON"),
        ("[]", "found list as the whole"),
        ("{}", "found version None; allowed is version 1"),
        (made().to_json()[:-40], "found no JSON"),
        (made().to_json().replace("0.3", "NaN", 1), "found NaN; allowed is finite numbers"),
        (edited("attnc_calibration", value=2), "found version 2"),
        (edited("colour", value=1), "found 'colour' in the calibration"),
        (edited("regions", value=[]), "found list as regions"),
        (edited("digests", value={}), "found dict as digests"),
        (edited("digests", 0, value="x"), "found 'x' as a digest"),
        (edited("digests", value=[]), "found 2 batches of"),
        (edited("pairs", value=-1), "found -1 as pairs"),
        (edited(*AT, "error", value=-1), "found -1 as error of"),
        (edited(*AT, "error", value="small"), "found 'small' as error of"),
        (edited(*AT, "error", value=True), "found True as error of"),
        (edited(*AT, "mass", value=1.5), "found 1.5 as mass of"),
        (edited(*AT, "batches", value=1.5), "found 1.5 as batches of"),
        (edited(*AT, value={}), "found 'no seconds' in"),
        (edited("regions", "", "settings", value={"sliding": {}}), "found 'sliding' in region"),
        (edited("regions", "", "settings", value={"low_rank": {}}), "allowed is low_rank{rank=64}, all knobs"),
        (edited("regions", "", "failed", value={"low_rank{rank=8}": 3}), "found 3 as failed of region"),
    ],
)
def test_a_file_that_holds_none_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(ArtifactError) as found:
        Calibration.from_json(text, "errors.json")
    said = str(found.value)
    assert said.startswith("read errors.json: found ") and says in said and said.endswith("or name another file.")


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it cannot be read .* Make it with `attnc calibrate`"):
        Calibration.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"it cannot be written .* Name a file that can"):
        made().save(tmp_path / "none" / "errors.json")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"model": "Other"}, "found model 'Model', allowed is 'Other'"),
        ({"device": "h100"}, "found device 'cpu', allowed is 'h100'"),
        ({"pairs": 3}, "found pairs 8, allowed is 3"),
        ({"regions": {}}, "found the regions '', allowed is none"),
        ({"regions": {"": RegionErrors("k", "layers.0 attention", 1.0, {})}}, "found other settings in region ''"),
        ({"regions": {"": RegionErrors("k", "wider", 1.0, {})}}, "found region '' as layers.0 attention"),
    ],
)
def test_what_was_begun_otherwise_does_not_go_on(other, says: str) -> None:
    assert resumed(made(), made(digests=[]), "errors.json") == made()
    with pytest.raises(UsageError, match=says):
        resumed(made(), made(**other), "errors.json")
