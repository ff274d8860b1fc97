"""Key lists on the CPU: one sort of all choices, rows that stand for a group, tiles added against a known level."""

from __future__ import annotations

import pytest
import torch

from attnc.codegen import cpu_key_lists, selectors, selectors_blocks
from attnc.codegen.key_lists import NONE, kept_by, sorted_by_block
from attnc.forms import parse_form
from attnc.forms.masked import reference
from attnc.forms.selected import Selected
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule
from tests.tolerance import error

RULE = AttentionRule.parse("score=0.25 * s; keep=j - i <= 0")
SPELLINGS = ("block_mixture{block=16,top_k=3}", "compressed_selection{block=8,window=1,sinks=0,top_k=4}")


def given_of(spelling: str, *, times: float = 1.0) -> tuple[Selected, Operands]:
    form = parse_form(spelling)
    assert isinstance(form, Selected)
    query, key, value = (torch.randn(2, heads, 150, 16, dtype=torch.float64) for heads in (4, 2, 2))
    return form, Operands(query, times * key, value, [], [], RULE)


@pytest.mark.parametrize("heads", [2, 4])
def test_one_sort_holds_every_choice_once(heads: int) -> None:
    B, Hq, H, L, blocks, n = 2, 4, 2, 33, 5, 3
    chosen = torch.stack([torch.randperm(blocks)[:n] for _ in range(B * heads * L)]).view(B, heads, L, n)
    chosen[torch.rand(chosen.shape) < 0.3] = NONE
    every = sorted_by_block(chosen, (B, Hq, H, L), blocks, 4, tile=32)
    wanted = (chosen.unsqueeze(-1) == torch.arange(blocks)).any(3).repeat_interleave(4, -1)
    held = sum(kept_by(lists, (B, Hq, H, L), 4 * blocks).long() for lists in every)
    assert torch.equal(held, wanted.repeat_interleave(Hq // heads, 1).long())
    for lists in every:
        rows = lists.spread().rows
        assert lists.heads == Hq // heads and int(rows[rows >= 0].bincount().max()) == 1
        assert all(len({row % (B * Hq * L) for row in tile if row >= 0}) == sum(row >= 0 for row in tile)
                   for tile in rows.tolist())  # fmt: skip


@pytest.mark.parametrize("times", [1.0, 40.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_parts_far_above_the_level_of_their_row_count_as_the_formula_says(
    spelling: str, times: float, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, given = given_of(spelling, times=times)
    chosen = form.choose(given)
    taken = []
    whole = cpu_key_lists.RowSums.add_whole
    monkeypatch.setattr(
        cpu_key_lists.RowSums, "add_whole", lambda *args: taken.append(whole(*args)) or taken[-1]
    )  # fmt: skip
    out, lse = cpu_key_lists.forward(*form.laid(chosen, given))
    want, want_lse = reference(form.narrowed(chosen, given))
    assert error(out, want) < 1e-12 and error(lse, want_lse) < 1e-12
    assert all(taken) == (times == 1.0)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_choosing_in_pieces_of_the_keys_in_reach_chooses_the_same(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, given = given_of(spelling)
    whole = form.choose(given)
    monkeypatch.setattr(selectors, "CACHED", 500)
    monkeypatch.setitem(selectors_blocks.SCORES, "cpu", 500)
    assert torch.equal(form.choose(given), whole)
