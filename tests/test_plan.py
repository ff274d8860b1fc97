"""A plan survives JSON, and a text that is none is refused."""

from __future__ import annotations

import pytest

from attnc.errors import ArtifactError
from attnc.plan import Plan
from attnc.region import Choice


def test_a_plan_round_trips() -> None:
    plan = Plan(
        {
            "model.layers.0.self_attn": Choice("dense", "faster", 0.1, 0.3, {"block_sparse": "no mask."}),
            "": Choice("as written", "nothing pays"),
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
