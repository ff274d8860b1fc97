"""Damaged spellings, rules and plans give a sentence or a valid object; records and devices have tests of their own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from attnc.errors import AttncError
from attnc.expr_text import parse
from attnc.forms import FORMS, parse_attention, parse_form
from attnc.plan import Plan
from attnc.region import Choice
from attnc.rule_attention import AttentionRule

RULE = "score=50.0 * tanh(0.0025 * s) + t0[h, i - j]; keep=j - i <= 0 and t1[b, i] == t1[b, j]; empty=zero; sink=t2[h]"
PLAN = Plan({"layers.0": Choice("flash{block_m=64}", "tuned", 1e-3, 2e-3, {"dense": "no."}, {"dense": 0.1})}, "h100")
READERS: dict[str, tuple[Callable[[str], object], tuple[str, ...]]] = {
    "forms": (parse_form, tuple(form().spell() for form in FORMS) + ("block_sparse{provider=flex,block_m=128}",)),
    "operators": (parse_attention, (f"flash{{block_m=64,skip=table}} | {RULE}", f"dense | {RULE}")),
    "rules": (AttentionRule.parse, (RULE, "score=s; dropout=0.1; row=1.0 + t0[b, i]")),
    "expressions": (parse, ("where(j - i <= n0, s * 0.5, min(i // 4, j % 3))", "not (t0[b, j] or j == i)")),
    "plans": (Plan.from_json, (PLAN.to_json(),)),
}
ODD = ("{", "}", "[", "]", "(", ")", "((((", "=", ",", ";", "|", "\0", "é", "1e999", "-1", '"', "null", "[]", "9" * 60)


def damaged(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 3)):
        at, end = sorted(draw.randint(0, len(text)) for _ in range(2))
        text = draw.choice(
            (
                text[:at] + text[at + 1 :],
                text[:at] + draw.choice(ODD) + text[at:],
                text[:at] + draw.choice(ODD) + text[end:],
                text[:at] + text[at:end] * 2 + text[end:],
                text[:at],
            )
        )
    return text


@pytest.mark.parametrize("kind", READERS)
def test_damaged_text_gives_a_sentence_or_an_object(kind: str) -> None:
    read, texts = READERS[kind]
    draw, refused = random.Random(0), 0
    for _ in range(400):
        text = damaged(draw.choice(texts), draw)
        try:
            assert read(text) is not None
        except AttncError as exc:
            refused += 1
            assert len(str(exc)) > 20 and len(str(exc)) < 4000, text
    assert refused > 100


@pytest.mark.parametrize("kind", READERS)
def test_deep_nesting_is_refused(kind: str) -> None:
    read, _ = READERS[kind]
    for text in ("(" * 5000, "[" * 5000, "score=" + "(" * 3000 + "s" + ")" * 3000, "-" * 5000 + "i"):
        with pytest.raises(AttncError):
            read(text)
