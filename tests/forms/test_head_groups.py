"""Head groups: each run of heads is attended by its own form, and finds by its number what the rule looks up."""

from __future__ import annotations

import pytest
import torch

from attnc.errors import UsageError
from attnc.forms import parse_form
from attnc.forms.head_groups import HeadGroups
from attnc.operands import Operands
from attnc.ops import attention, spell_attention
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.tolerance import assert_close

RULE = AttentionRule.parse("score=0.35 * s; keep=j - i <= 0; sink=f0[h]")
BOTH = "head_groups{of=1*block_mixture(block=8;top_k=2)&2*sinks_window(sinks=2;window=5)}"


def region(H: int = 3, **facts) -> AttentionRegion:
    shape = AttentionShape(2, 2 * H, H, 33, 33, 8, 8)
    return AttentionRegion("layer", "sdpa", RULE, shape, "float32", "cpu", **facts)


def operands() -> Operands:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 33, 8), torch.randn(2, 3, 33, 8), torch.randn(2, 3, 33, 8)
    return Operands(query, key, value, [torch.randn(6)], [], RULE)


def test_each_run_is_its_form_on_its_heads() -> None:
    given = operands()
    form = parse_form(BOTH)
    assert isinstance(form, HeadGroups) and parse_form(form.spell()) == form and form.refuse(region()) is None
    out, lse = attention(*given[:5], spell_attention(form, RULE))
    first, rest = parse_form("block_mixture{block=8,top_k=2}"), parse_form("sinks_window{sinks=2,window=5}")
    for one, heads in ((first, slice(0, 2)), (rest, slice(2, 6))):
        wanted = one.reference(given)
        assert_close(out[:, heads], wanted[0][:, heads].float())
        assert_close(lse[:, heads], wanted[1][:, heads].float())


def test_runs_of_exact_forms_are_exact() -> None:
    dense = parse_form("head_groups{of=1*dense&2*dense}")
    assert dense.is_exact(region()) and not parse_form(BOTH).is_exact(region())
    for got, wanted in zip(dense.cpu(operands()), parse_form("dense").cpu(operands()), strict=True):
        assert_close(got, wanted)


def test_what_a_run_refuses_and_heads_that_do_not_divide_are_refused() -> None:
    assert "into 3 parts, found 4 key heads" in parse_form(BOTH).refuse(region(4))
    assert "page_bounds serves decode" in parse_form("head_groups{of=1*page_bounds&2*dense}").refuse(region())
    assert "found cross-attention" in parse_form(BOTH).refuse(region(crosses=True))


@pytest.mark.parametrize(
    "of", ["1*dence", "1*dense(x=1)", "1*scan", "1*token_top_k(scorer=indexer)", "1*head_groups", ""]
)
def test_a_run_of_no_form_of_attention_is_no_spelling(of: str) -> None:
    with pytest.raises(UsageError):
        parse_form(f"head_groups{{of={of}}}")
