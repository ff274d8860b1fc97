"""Family A of softmax attention: every row has a spelling; what joins, shares and shifts, and what must not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnc
from tests.gallery import BY_NAME
from tests.gallery_entry import Core, ids
from tests.gallery_family_a import ROWS
from tests.gallery_run import assert_same, attention, attnc_compiled, run

OUT_OF_SCOPE = {"A24", "A27", "A28", "A30"}
NAMED_ONLY = {"A26"}  # an approximation: nothing to recognise


def qkv(B: int = 2, H: int = 4, L: int = 33, E: int = 16) -> list[torch.Tensor]:
    return [torch.randn(B, H, L, E) for _ in range(3)]


def same(fn, *args, backward: bool = True):
    """The regions of a function that attnc computes as eager does."""
    model = Core(fn, {}, {}) if not isinstance(fn, nn.Module) else fn
    want = run(model, args, backward)
    compiled = attnc_compiled(model, inner="eager")
    assert_same(run(compiled, args, backward, named=model), want)
    return attention(attnc.last_report(compiled))


def test_every_row_in_scope_has_a_spelling() -> None:
    wanted = {f"A{n}" for n in range(1, 34)} - OUT_OF_SCOPE - NAMED_ONLY
    assert wanted == set(ROWS)
    assert all(name in BY_NAME for names in ROWS.values() for name in names)


# Sums of products


def test_weighted_products_are_one_product_over_more_channels() -> None:
    a, b = torch.randn(2, 4, 33, 8), torch.randn(2, 1, 33, 8)
    (region,) = same(lambda q, k, v, a, b: ((q @ k.mT - 0.5 * (a @ b.mT)) * 0.25).softmax(-1) @ v, *qkv(), a, b)
    assert (region.shape.E, region.shape.Ev, region.shape.H) == (24, 16, 4)
    assert region.rule.scale == 0.25 and region.rule.bias is None and not region.captured


def test_products_joined_under_a_cap() -> None:
    a, b = torch.randn(2, 4, 33, 8), torch.randn(2, 4, 33, 8)
    (region,) = same(lambda q, k, v, a, b: (5 * torch.tanh((q @ k.mT + a @ b.mT) / 20)).softmax(-1) @ v, *qkv(), a, b)
    assert region.shape.E == 24 and region.rule.softcap == 5.0


@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k, a, b: (q @ k.mT) * (a @ b.mT) * 0.25,  # a product of products
        lambda q, k, a, b: q @ k.mT * 0.25 + torch.tanh(a @ b.mT),  # a function of one of them
        lambda q, k, a, b: q @ k.mT * 0.25 + a @ b.flip(2).mT,  # keys in another order
        lambda q, k, a, b: q @ k.mT * 0.25 + (a @ b.mT).mT,  # rows for columns
        lambda q, k, a, b: q @ k.mT * 0.25 + (a @ b.mT) * torch.arange(33),  # a weight per key
        lambda q, k, a, b: q @ k.mT * 0.25 + a.roll(1, 1) @ b.mT,  # heads in another order
    ],
)
def test_products_that_are_not_simply_added_stay_apart_or_equal(scores) -> None:
    a, b = torch.randn(2, 4, 33, 8), torch.randn(2, 4, 33, 8)
    same(lambda q, k, v, a, b: scores(q, k, a, b).softmax(-1) @ v, *qkv(), a, b)


def test_product_over_as_many_channels_as_keys_stays_a_bias() -> None:
    a, b = torch.randn(2, 4, 33, 33), torch.randn(2, 4, 33, 33)
    (region,) = same(lambda q, k, v, a, b: ((q @ k.mT + a @ b.mT) * 0.25).softmax(-1) @ v, *qkv(), a, b)
    assert region.shape.E == 16 and region.rule.bias is not None


# Shared maps


def test_shared_map_that_is_also_returned_stays_as_written() -> None:
    def shared(q, k, v, other):
        weights = (q @ k.mT * 0.25).softmax(-1)
        return weights @ v, weights @ other, weights

    assert not any(region.choice.rewrites for region in same(shared, *qkv(), torch.randn(2, 4, 33, 16)))


def test_shared_map_behind_active_dropout_keeps_its_one_random_stream() -> None:
    def shared(q, k, v, other):
        weights = torch.dropout((q @ k.mT * 0.25).softmax(-1), 0.5, True)
        return weights @ v, weights @ other

    assert not same(shared, *qkv(), torch.randn(2, 4, 33, 16))


def test_shared_map_met_from_the_wrong_side_stays_one() -> None:
    def shared(q, k, v, other):
        weights = (q @ k.mT * 0.25).softmax(-1)
        return weights @ v, weights.mT @ other

    assert not any(region.choice.rewrites for region in same(shared, *qkv(), torch.randn(2, 4, 33, 16)))


# Relative positions


def test_shift_of_other_width_reads_no_distance() -> None:
    """A reshape that is no shift: its offsets do not follow i - j."""

    def moved(q, k, v, table):
        turned = (q @ table.mT).view(2, 4, 33, 33).mT.reshape(2, 4, 33, 33)
        return ((q @ k.mT + turned) * 0.25).softmax(-1) @ v

    (region,) = same(moved, *qkv(), torch.randn(4, 33, 16))
    assert "i - j" not in region.facts["score"] and "j - i" not in region.facts["score"]


def test_shift_behind_a_window_reads_its_distance() -> None:
    def shifted(q, k, v, table):
        moving = torch.nn.functional.pad(q @ table.mT, (1, 0)).view(2, 4, 34, 33)[:, :, 1:]
        i, j = ids(33)
        return ((q @ k.mT + moving) * 0.25).masked_fill((j > i) | (i - j >= 8), -torch.inf).softmax(-1) @ v

    (region,) = same(shifted, *qkv(), torch.randn(4, 33, 16))
    assert "f0[b, h, i, j - i + 32]" in region.facts["score"] and region.mask == "window"
