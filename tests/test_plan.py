"""A plan survives JSON, and a text that is none is refused."""

from __future__ import annotations

import json

import pytest

from attnc.errors import ArtifactError
from attnc.plan import Plan
from attnc.region import Choice


def test_a_plan_round_trips() -> None:
    plan = Plan(
        {
            "model.layers.0.self_attn": Choice("dense", "faster", 0.1, 0.3, {"block_sparse": "no mask."}),
            "": Choice("as written", "nothing pays"),
            "model.layers.1.self_attn": Choice("low_rank{rank=16}", "by name", error=0.0125, low_s=0.05, high_s=0.2),
        },
        device="cpu",
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.choices == plan.choices
    assert dict(again.choices["model.layers.0.self_attn"].refused) == {"block_sparse": "no mask."}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"attnc_plan": 2}', '{"attnc_plan": 1, "choices": {"a": {"form": "dense", "colour": 1}}}']
)
def test_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="read a plan"):
        Plan.from_json(text)


def choices(**fields: object) -> str:
    return json.dumps(
        {"attnc_plan": 1, "device": "cpu", "choices": {"a": {"form": "dense", "reason": "why", **fields}}}
    )


def test_a_plan_from_before_errors_and_intervals_reads() -> None:
    choice = Plan.from_json(choices(predicted_s=0.1)).choices["a"]
    assert (choice.error, choice.low_s, choice.high_s) == (None, None, None)
    assert Plan.from_json(choices(error=0)).choices["a"].error == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"error": -0.1},
        {"error": "small"},
        {"error": True},
        {"error": float("nan")},
        {"low_s": 0.1},
        {"high_s": 0.1},
        {"low_s": 0.2, "high_s": 0.1},
        {"low_s": 0, "high_s": 0.1},
    ],
    ids=str,
)
def test_an_error_or_an_interval_that_is_none_is_refused(fields: dict) -> None:
    with pytest.raises(ArtifactError, match=f"the choice for 'a' has .*{next(iter(fields))}"):
        Plan.from_json(choices(**fields))
