"""A mask that arrives as a tensor is looked at once, its empty tiles are skipped, and another one compiles nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnc
from attnc.expr_text import parse
from attnc.forms import parse_form
from attnc.forms.kept_tiles import KeptTiles
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.ops import attention as attend
from attnc.rule_attention import AttentionRule
from tests.gallery_run import attention
from tests.tolerance import assert_close

L, SPELLED = 290, "kept_tiles{rows=32,block=32}"


def sparse(*shape: int, seed: int = 0) -> torch.Tensor:
    """A mask of 32 x 32 blocks of which a few and the diagonal are kept; the first row is empty."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(*shape, 10, 10, generator=generator) < 0.03
    mask = blocks.repeat_interleave(32, -1).repeat_interleave(32, -2)[..., :L, :L] | torch.eye(L, dtype=torch.bool)
    mask[..., 0, :] = False
    return mask


@pytest.fixture
def looks(monkeypatch) -> list[Operands]:
    """The operands of each classification."""
    found: list[Operands] = []
    classified = KeptTiles._classified

    def counted(self, given):
        found.append(given)
        return classified(self, given)

    monkeypatch.setattr(KeptTiles, "_classified", counted)
    return found


@pytest.mark.parametrize(
    ("keep", "shape"), [("p0[b, h, i, j]", (2, 4)), ("p0[0, 0, i, j] and j - i <= 0", (1, 1))], ids=["heads", "causal"]
)
def test_skipped_tiles_change_nothing(keep: str, shape: tuple[int, int]) -> None:
    rule, mask = AttentionRule(parse("0.25 * s"), parse(keep), "zero"), sparse(*shape)
    leaves = [torch.randn(2, H, L, 8, requires_grad=True) for H in (4, 2, 2)]
    want = reference(Operands(*leaves, [mask], [], rule))[0]
    got = attend(*leaves, [mask], [], f"{SPELLED} | {rule.spell()}")[0]
    assert_close(got, want)
    for a, c in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, want)), strict=True):
        assert_close(a, c)


class Two(nn.Module):
    """Two layers under one mask."""

    def forward(self, q, k, v, mask):
        for _ in range(2):
            q = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return q


def test_each_mask_is_looked_at_once_and_compiles_nothing(looks) -> None:
    qkv, mask, other = [torch.randn(1, 2, L, 8) for _ in range(3)], sparse(1, 1), sparse(1, 1, seed=1)
    compiled = torch.compile(Two(), backend="attnc", options={"inner": "eager", "force": SPELLED, "strict": True})
    with torch.no_grad():
        compiled(*qkv, mask)
        assert all(region.choice.form == SPELLED for region in attention(attnc.last_report(compiled)))
        looks.clear()
        for each, times in ((mask, 0), (other, 1), (mask, 0), (other, 0)):
            assert_close(compiled(*qkv, each), Two()(*qkv, each))
            assert len(looks) == times
            looks.clear()
        mask[..., 3] = True
        assert_close(compiled(*qkv, mask), Two()(*qkv, mask))
        assert len(looks) == 1


def test_only_a_sparse_mask_that_is_an_input_is_offered() -> None:
    def kept(*args) -> tuple[float | None, str | None]:
        with torch.no_grad():
            (region, _) = attention(attnc.explain(Two(), *args))
        return region.tiles_kept, parse_form("kept_tiles").refuse(region)

    qkv = [torch.randn(1, 2, L, 8) for _ in range(3)]
    assert kept(*qkv, sparse(1, 1))[1] is None
    share, why = kept(*qkv, torch.ones(1, 1, L, L, dtype=torch.bool))
    assert share == 1.0 and "found 100% of them kept" in why
