"""How far gradients of masked pairs come is read off the spelling, and says what a row without keys is in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnc
from tests.tiny import compiled
from tests.tolerance import assert_close, error

LOW = torch.finfo(torch.float32).min
LENGTH = 24


def added(s: Tensor, keep: Tensor) -> Tensor:
    return (s + torch.where(keep, 0.0, LOW)).softmax(-1)


def chosen(s: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, s, LOW).softmax(-1)


def filled(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, LOW).softmax(-1)


def filled_then_biased(s: Tensor, keep: Tensor) -> Tensor:
    return (s.masked_fill(~keep, LOW) + torch.arange(LENGTH) * 0.1).softmax(-1)


def added_then_clamped(s: Tensor, keep: Tensor) -> Tensor:
    return torch.clamp(s + torch.where(keep, 0.0, LOW), min=LOW).softmax(-1)


def infinite_then_zeroed(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, -torch.inf).softmax(-1).masked_fill(~keep, 0.0)


EMPTY = {
    added: "mean_added",
    chosen: "mean",
    filled: "mean",
    filled_then_biased: "unknown",
    added_then_clamped: "unknown",
    infinite_then_zeroed: "zero",
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weights", EMPTY, ids=lambda f: f.__name__)
def test_rows_without_keys_and_their_gradients(weights, training: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> Tensor:
        at = torch.arange(LENGTH)
        keep = (at[None, :] <= at[:, None]) & present[:, None, None, :]
        return weights(q @ k.mT * 0.3, keep) @ v

    qkv = [torch.randn(2, 2, LENGTH, 8, requires_grad=training) for _ in range(3)]
    present = torch.arange(LENGTH)[None] >= torch.tensor([[0], [7]])  # padded on the left: 7 rows without keys
    fast = compiled(attend, inner="eager")
    with torch.set_grad_enabled(training):
        got, want = fast(*qkv, present), attend(*qkv, present)
    assert_close(got, want)
    (region,) = attnc.last_report(fast).regions
    empty = EMPTY[weights] if training or EMPTY[weights] == "zero" else "mean"
    assert region.rule.empty == empty and region.choice.rewrites == (empty != "unknown")
    if training:
        cotangent = torch.randn_like(want)
        for one, two in zip(*(torch.autograd.grad(out, qkv, cotangent) for out in (got, want)), strict=True):
            assert error(one, two) < 1e-5


def run_mask(shape: tuple[int, ...]) -> Tensor:
    """Zeros, with the second batch masked whole where the shape has batches, else the first five rows."""
    mask = torch.zeros(shape)
    mask[slice(5) if len(shape) == 2 else -1] = LOW
    return mask


SHAPES = [(2, 1, LENGTH, LENGTH), (2, 1, 1, LENGTH), (2, 1, LENGTH, 1), (LENGTH, LENGTH)]
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
SUMS = {
    "alone": lambda s, m: s + m,
    "beside_a_chosen_mask": lambda s, m: s.masked_fill(~CAUSAL, LOW) + m,
    "beside_an_infinite_mask": lambda s, m: s.masked_fill(~CAUSAL, -torch.inf) + m,
    "beside_an_added_mask": lambda s, m: s + torch.where(CAUSAL, 0.0, LOW) + m,
    "within_a_function": lambda s, m: s + m.clamp(min=-10.0),
    "under_a_clamp": lambda s, m: torch.max(s + m, torch.tensor(LOW)),
    "under_a_chosen_mask": lambda s, m: (s + m).masked_fill(~CAUSAL, LOW),
}


def sums_of_shapes():
    """Every sum with every shape, trained and run in turn; the rest is slow."""
    for first, name in enumerate(SUMS):
        for second, shape in enumerate(SHAPES):
            for training in (False, True):
                marks = () if training == bool((first + second) % 2) else pytest.mark.slow
                yield pytest.param(name, shape, training, id=f"{name}-{shape}-{training}", marks=marks)


@pytest.mark.parametrize(("name", "shape", "training"), list(sums_of_shapes()))
def test_a_float_mask_of_the_run_may_lose_rows(name: str, shape: tuple[int, ...], training: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return SUMS[name](q @ k.mT * 0.3, m).softmax(-1) @ v

    torch.manual_seed(0)
    qkv = [torch.randn(2, 2, LENGTH, 8, requires_grad=training) for _ in range(3)]
    mask = run_mask(shape)
    fast = compiled(attend, inner="eager")
    with torch.set_grad_enabled(training):
        got, want = fast(*qkv, mask), attend(*qkv, mask)
    assert_close(got, want)
    if training:
        cotangent = torch.randn_like(want)
        for one, two in zip(*(torch.autograd.grad(out, qkv, cotangent) for out in (got, want)), strict=True):
            assert error(one, two) < 1e-5


def infinite_mask(shape: tuple[int, ...]) -> Tensor:
    """Zeros, with the second batch at -inf where the shape has batches, else the first five rows; a key lost beside."""
    mask = torch.zeros(shape)
    mask[..., 3:4] = -torch.inf if shape[-1] > 1 else 0.0
    mask[slice(5) if len(shape) == 2 else -1] = -torch.inf
    return mask


WINDOW = CAUSAL & ~CAUSAL.roll(-8, 1).tril()
OF_INFINITE = {
    "alone": SUMS["alone"],
    "beside_an_infinite_mask": SUMS["beside_an_infinite_mask"],
    "in_a_window": lambda s, m: s.masked_fill(~WINDOW, -torch.inf) + m,
    "behind_a_softcap": lambda s, m: 5.0 * torch.tanh(s / 5.0) + m,
    "twice": lambda s, m: s + m + m.roll(1, -1),
}
FORMS = (
    "dense",
    "block_sparse{provider=flex,block_m=16,block_n=16}",
    "block_sparse{provider=blocked,block_m=16,block_n=16}",
)


def forms_of_shapes():
    """Every shape densely, every form with one shape; the rest is slow."""
    for form in FORMS:
        for shape in SHAPES:
            marks = () if form == "dense" or shape == SHAPES[0] else pytest.mark.slow
            yield pytest.param(shape, form, id=f"{shape}-{form}", marks=marks)


@pytest.mark.parametrize(("shape", "form"), list(forms_of_shapes()))
@pytest.mark.parametrize("name", OF_INFINITE)
def test_a_row_that_a_mask_of_the_run_leaves_at_minus_infinity_is_nan_as_by_hand(name, shape, form) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return OF_INFINITE[name](q @ k.mT * 0.3, m).softmax(-1) @ v

    qkv = [torch.randn(2, 2, LENGTH, 8) for _ in range(3)]
    fast = compiled(attend, inner="eager", force=form, options={"strict": False})
    for mask in (infinite_mask(shape), run_mask(shape), torch.zeros(shape)):
        with torch.no_grad():
            got, want = fast(*qkv, mask), attend(*qkv, mask)
        torch.testing.assert_close(got, want, equal_nan=True, atol=1e-5, rtol=1e-5)
    (region,) = attnc.last_report(fast).regions
    if form == "dense":
        assert region.choice.rewrites and region.rule.empty == "nan"


def test_scaled_dot_product_attention_gives_zero_there() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m)

    qkv, mask = [torch.randn(2, 2, LENGTH, 8) for _ in range(3)], infinite_mask(SHAPES[0])
    fast = compiled(attend)
    with torch.no_grad():
        assert_close(fast(*qkv, mask), attend(*qkv, mask))
    assert attnc.last_report(fast).regions[0].rule.empty == "never"
