"""The zoo's table: recall, verdicts and refusals of made-up records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import zoo_table as table

EXACT = {"first": 1e-6, "second": 1e-6}
OFF = {"first": 0.3, "second": 0.3}
NONE = {"attention": 0, "ffn": 0, "moe": 0, "recurrence": 0, "optional": 0}


def record(model: str = "bert", found: dict[str, int] | None = None, **given: Any) -> dict[str, Any]:
    """A record of two attentions and two feed-forwards that attnc got right."""
    both = {"errors": EXACT, "graphs": 1, "breaks": {}, "compile_s": 1.0}
    ours = {**both, "regions": found or {"attention": 2, "ffn": 2}}
    control = {**both, "eager": {"first": 0.0}}
    own = {"attn": "eager", "mask": "none", "mode": "eval", "category": "encoder", "status": "ok"}
    own |= {"truth": {**NONE, "attention": 2, "ffn": 2, **given.pop("truth", {})}}
    result = {"attnc": {**ours, **given.pop("ours", {})}, "control": {**control, **given.pop("control", {})}}
    result |= {"inner_alone": given.pop("inner_alone")} if "inner_alone" in given else {}
    return {"model": model, "key": f"{model}|eager-none-eval", "result": result, **own, **given}


def left_out() -> dict[str, Any]:
    return {**record("mpnet"), "result": {"skipped": "has no sdpa"}}


def test_recall_counts_no_more_than_the_truth_of_each_record() -> None:
    records = [record(found={"attention": 5}), record("gpt2", found={"attention": 1})]
    assert table.recall(records, "attention") == (3, 4)
    assert table.recall(records, "ffn") == (0, 4)


def test_a_model_that_the_library_does_not_have_is_not_counted() -> None:
    assert table.recall([record(), left_out()], "attention") == (2, 2)
    assert table.verdict(left_out()) == "left out"


def test_a_record_without_a_result_counts_as_a_miss() -> None:
    late = {**record(), "status": "timeout"}
    del late["result"]
    assert table.recall([late], "attention") == (0, 2)
    assert table.verdict(late) == "late"


def test_heads_may_be_counted_as_feed_forward() -> None:
    head = {"truth": {"optional": 1}}
    assert table.beyond([record(found={"ffn": 3}, **head)], "ffn") == []
    assert len(table.beyond([record(found={"ffn": 4}, **head)], "ffn")) == 1
    assert len(table.beyond([record(found={"attention": 3}, **head)], "attention")) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "equal"),
        ({"ours": {"errors": OFF}}, "wrong"),
        ({"ours": {"errors": {"first": None}}}, "wrong"),
        ({"ours": {"errors": None, "failed": "RuntimeError: no"}}, "failed"),
        ({"ours": {"errors": OFF}, "control": {"errors": OFF}}, "open"),
        ({"ours": {"errors": OFF}, "control": {"eager": {"first": 0.1}}}, "open"),
        ({"ours": {"errors": OFF}, "inner_alone": {"errors": OFF}}, "open"),
        ({"ours": {"errors": OFF}, "inner_alone": {"errors": EXACT}}, "wrong"),
        ({"ours": {"failed": "x", "errors": None}, "control": {"failed": "x", "errors": None}}, "open"),
        ({"status": "error", "result": None}, "failed"),
        ({"status": "crash", "result": None}, "late"),
        ({"status": "timeout", "result": {"attnc": {"errors": EXACT}}}, "equal"),  # the control ran out of time
    ],
)
def test_a_result_is_wrong_only_where_the_control_is_right(given: dict[str, Any], expected: str) -> None:
    assert table.verdict(record(**given)) == expected


def test_more_graphs_or_breaks_than_dynamo_alone_are_told() -> None:
    assert not table.more_breaks(record())
    assert table.more_breaks(record(ours={"graphs": 2}))
    assert table.more_breaks(record(ours={"breaks": {"data dependent": 1}}))
    assert not table.more_breaks(record(control={"graphs": 2, "breaks": {"data dependent": 1}}))
    many = {"graphs": 6, "breaks": {}}
    assert table.more_breaks(record(ours=many)) and not table.more_breaks(record(ours=many, inner_alone=many))


def test_refusals_are_those_of_models_with_a_miss() -> None:
    refused = {"unmatched": [["softmax", "axis 3 of 4 is no key axis", "view_7", "encoder.0", 2, ""]]}
    again = {"unmatched": [["softmax", "axis 2 of 3 is no key axis", "view_9", "encoder.0", 1, ""]]}
    complete = record(ours=refused)
    missing = record("gpt2", found={"ffn": 2}, ours=refused)
    other = record("opt", found={"ffn": 2}, ours=again)
    found = table.refusals([complete, missing, other])
    assert found == [("axis n of n is no key axis", 3, [missing, other])]


def test_time_lost_in_a_pass_is_told() -> None:
    page = table.page(
        [record(ours={"own_s": {"lift": 0.5, "choose": 60.0}}), record("gpt2", ours={"own_s": {"lift": 1}})]
    )
    assert "more than 10 s in attnc's own passes: bert (choose 60 s)" in page


def test_a_miss_without_a_sentence_is_silent() -> None:
    refused = {"unmatched": [["softmax", "no product", "view_7", "", 1, ""]]}
    quiet = record(found={"ffn": 2})
    assert table.silent([record(), record("a", found={"ffn": 2}, ours=refused), quiet]) == [quiet]


def test_the_latest_record_of_a_key_counts(tmp_path: Path) -> None:
    lines = [json.dumps(record(found={"attention": count})) for count in (0, 1)]
    (tmp_path / "eager-none-eval.jsonl").write_text("\n".join([*lines, '{"key": "cut o']), encoding="utf-8")
    assert [table.found_of(r, "attention") for r in table.load(tmp_path)] == [1]


def test_the_page_names_what_is_missing() -> None:
    records = [record(), record("gpt2", found={"attention": 1, "ffn": 2}), record("t5", ours={"errors": OFF})]
    page = table.page([*records, left_out(), record(cache=True)])
    assert "| eager-none-eval | 3 | 5/6 83.3% |" in page
    assert "| eager-none-eval-cache | 1 | 2/2 100.0% |" in page
    assert "| encoder | 3 | 5/6 83.3% |" in page
    assert "attention missed in gpt2 (1/2)" in page
    assert "missed without a refusal: gpt2" in page
    assert "wrong: t5 (error 3.0e-01)" in page


def test_settings_have_names_of_their_own() -> None:
    names = [table.setting_of(record(**given)) for given in ({}, {"inner": "inductor"}, {"experts": "grouped_mm"})]
    assert names == ["eager-none-eval", "eager-none-eval-inductor", "eager-none-eval-grouped_mm"]
    assert table.is_plain(record())
    assert not any(table.is_plain(record(**{name: True})) for name in ("cache", "unlisted"))
