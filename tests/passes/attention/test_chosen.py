"""Masks made of lists of the run are read as such, run as lists and as tables, and told from what only looks alike."""

from __future__ import annotations

import pytest
import torch

import attnc
from attnc.expr_text import parse, spell
from attnc.forms.listed import Listed, Listing, listing_of, unlisted
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.ops import attention as attend
from attnc.rule_attention import AttentionRule
from tests.gallery_chosen import ENTRIES, L, causal, finish
from tests.gallery_run import assert_same, attention, attnc_compiled, run
from tests.tolerance import assert_close


def explained(attend, *args):
    with torch.no_grad():
        (region,) = attention(attnc.explain(attend, *args))
    return region


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_written_choice_runs_as_its_lists(entry) -> None:
    model, args = entry.make()
    want = run(model, args, backward=entry.train)
    model, args = entry.make()
    compiled = attnc_compiled(model, inner="aot_eager", force="listed")
    assert_same(run(compiled, args, backward=entry.train, named=model), want)
    (region,) = attention(attnc.last_report(compiled))
    assert region.choice.form == "listed"


def qkv(B=1, H=2):
    return [torch.randn(B, H, L, 8) for _ in range(3)]


def test_list_along_the_rows_is_no_list_of_keys() -> None:
    def attend(q, k, v, scores):
        best = scores.topk(5, -2).indices
        keep = torch.zeros((1, L, L), dtype=torch.bool).scatter(-2, best, True) & causal(L)
        return finish((q @ k.mT).masked_fill(~keep, -torch.inf), v)

    region = explained(attend, *qkv(), torch.randn(1, L, L))
    assert region.mask == "tensor" and "found none" in Listed().refuse(region)


def test_list_of_the_rows_of_each_key_is_refused_by_its_name() -> None:
    def attend(q, k, v, scores):
        best = scores.topk(5, -1).indices
        keep = torch.zeros((1, L, L), dtype=torch.bool).scatter(-1, best, True).mT & causal(L)
        return finish((q @ k.mT).masked_fill(~keep, -torch.inf), v)

    region = explained(attend, *qkv(), torch.randn(1, L, L))
    assert spell(region.rule.keep) == "i in t0[0, j, :5] and j - i <= 0"
    assert "lists no keys" in Listed().refuse(region)


@pytest.mark.parametrize(("place", "follows"), [(-1, True), (1, False)], ids=["least", "second"])
def test_threshold_follows_from_a_list_only_where_it_is_its_least(place: int, follows: bool) -> None:
    def attend(q, k, v, scores):
        values, best = scores.topk(5, -1)
        keep = torch.zeros((1, L, L), dtype=torch.bool).scatter(-1, best, True)
        keep = keep & (scores >= values[..., place].unsqueeze(-1)) & causal(L)
        return finish((q @ k.mT).masked_fill(~keep, -torch.inf), v)

    region = explained(attend, *qkv(), torch.randn(1, L, L))
    assert (spell(region.rule.keep) == "j in t0[0, i, :5] and j - i <= 0") == follows


def test_threshold_alone_keeps_ties_and_is_no_list() -> None:
    def attend(q, k, v, scores):
        level = scores.topk(5, -1).values[..., -1:]
        return finish((q @ k.mT).masked_fill(scores < level, -torch.inf), v)

    assert "found none" in Listed().refuse(explained(attend, *qkv(), torch.randn(1, L, L)))


RULES = {
    "j in t0[b, i, :4] and j - i <= 0": Listing(0, parse("t0[b, i]").args[1:], 4, 1, 1, parse("j - i <= 0")),
    "(j // 8) in t0[b, h // 2, i // 3, :4]": (8, 3),
    "j - i <= 0 and j in t0[b, h, :4]": (1, 0),
}


@pytest.mark.parametrize("keep", RULES)
def test_doubled_and_foreign_numbers_of_a_list_count_once_or_not_at_all(keep: str) -> None:
    assert spell(parse(keep)) == keep
    rule = AttentionRule(parse("0.25 * s"), parse(keep), "zero")
    found = listing_of(rule)
    assert isinstance(found, Listing) and (found == RULES[keep] or (found.width, found.rows) == RULES[keep])
    shape = [{"b": 2, "h": 4, "h // 2": 2, "i": L, "i // 3": 11}[spell(x)] for x in found.index]
    numbers = torch.randint(-1, L, (*shape, 4), generator=torch.Generator().manual_seed(0))
    query, key, value = torch.randn(2, 4, L, 8), torch.randn(2, 2, L, 8), torch.randn(2, 2, L, 8)
    given = Operands(query, key, value, [numbers], [], rule)
    want = reference(given)[0]
    assert_close(reference(unlisted(given))[0], want)
    for form in ("listed", "dense"):
        got = attend(query, key, value, [numbers], [], f"{form} | {rule.spell()}")[0]
        assert_close(got, want)


@pytest.mark.parametrize(("ranks", "empty"), [("masked", "never"), ("all", "unknown")])
def test_list_of_masked_scores_leaves_no_row_without_a_key(ranks: str, empty: str) -> None:
    def attend(q, k, v, scores):
        ranked = scores.masked_fill(~causal(L), -1e9) if ranks == "masked" else scores
        keep = torch.zeros((1, 1, L, L), dtype=torch.bool).scatter(-1, ranked.topk(5, -1).indices, True) & causal(L)
        bias = torch.where(keep, 0.0, -1e9)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)

    q, k, v = (x.requires_grad_() for x in qkv())
    (region,) = attention(attnc.explain(attend, q, k, v, torch.randn(1, 1, L, L)))
    assert region.rule.empty == empty and region.mask == "chosen"
