"""The option allow: a form by name, or one setting of it with its knobs; nothing else is leave enough."""

from __future__ import annotations

import pytest

from attnc.commands.tune import listed
from attnc.errors import UsageError
from attnc.forms import is_allowed, parse_form, settings_allowed
from attnc.options import Options
from attnc.passes.choose import approximations, checked_forms, choose
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape

RULE = AttentionRule.parse("score=0.125 * s; keep=j - i <= 0")
LONG = AttentionRegion("layer", "sdpa", RULE, AttentionShape(1, 8, 8, 16384, 16384, 64, 64), "float32", "cpu")
ONE = "block_mixture{block=512,top_k=2}"


def test_a_setting_that_is_named_with_its_knobs_is_taken_as_it_is() -> None:
    choice = choose(LONG, Options(allow=(ONE,))).choice
    assert choice is not None and parse_form(choice.form) == parse_form(ONE)
    assert "approximation by name" in choice.reason


def test_a_bare_name_gives_leave_for_every_setting_and_a_setting_for_itself_alone() -> None:
    mine, other = parse_form(ONE), parse_form("block_mixture{block=512,top_k=4}")
    assert is_allowed(mine, (ONE,)) and not is_allowed(other, (ONE,))
    assert is_allowed(other, ("block_mixture",)) and not is_allowed(other, ("low_rank",))
    assert settings_allowed("block_mixture", ("block_mixture", ONE)) == ()
    assert settings_allowed("block_mixture", (ONE,)) == (mine,)
    assert settings_allowed("low_rank", (ONE,)) is None


def test_a_forced_setting_that_allow_does_not_name_refuses_with_the_name_to_add() -> None:
    choice = choose(LONG, Options(force="block_mixture{block=512,top_k=4}", allow=(ONE,))).choice
    assert choice is not None and not choice.rewrites and "add 'block_mixture'" in choice.reason


def test_only_the_named_setting_is_measured() -> None:
    offers, _ = approximations(LONG, Options(allow=(ONE,)))
    assert [form for _, form in offers] == [parse_form(ONE)]
    assert len(approximations(LONG, Options(allow=("block_mixture",)))[0]) > 10


@pytest.mark.parametrize("wrong", ["block_mixture{top=2}", "block_mixtur", "block_mixture{block=512", "dense"])
def test_what_is_no_approximation_is_told(wrong: str) -> None:
    with pytest.raises(UsageError):
        checked_forms(Options(allow=(wrong,)))


def test_commas_between_knobs_are_part_of_a_name_on_the_command_line() -> None:
    assert listed(f"low_rank,{ONE}", "--allow") == ["low_rank", ONE]
