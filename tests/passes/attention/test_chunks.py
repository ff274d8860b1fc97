"""Attention written over chunks of keys is a window; what only looks like it stays as written, with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.passes import pipeline
from attnc.passes.attention.chunks import in_chunks
from tests.gallery_run import assert_same, attention, attnc_compiled, run

W, LENGTH = 4, 24
INF = float("inf")


class Chunks(nn.Module):
    """Blocks of W rows, each with its own block of keys and those beside it: keys at most W off are kept."""

    shift = 0  # of the values against the keys

    def around(self, x: Tensor, shift: int = 0) -> Tensor:
        """(b, h, blocks, 3 W, e): the keys of each block."""
        return F.pad(x, (0, 0, W - shift, W + shift)).unfold(2, 3 * W, W).transpose(-1, -2)

    def kept(self, blocks: int) -> Tensor:
        row, column = torch.arange(W)[:, None], torch.arange(3 * W) - W
        place = torch.arange(blocks)[:, None, None] * W + column
        return ((column - row).abs() <= W) & (place >= 0) & (place < blocks * W)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        s = torch.einsum("bhnie,bhnje->bhnij", q.unflatten(2, (-1, W)), self.around(k)) * 0.25
        return torch.where(self.kept(s.shape[2]), s, -INF)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lost: Tensor) -> Tensor:
        s = self.scores(q, k) + self.around(torch.zeros_like(lost).masked_fill(lost > 1, -1e9)).transpose(-1, -2)
        return torch.einsum("bhnij,bhnje->bhnie", s.softmax(-1), self.around(v, self.shift)).flatten(2, 3)


class Diagonals(Chunks):
    """Scores of the window only, a column each distance; weights are shifted back to meet the values of a block."""

    late = 0  # columns at the first key that padding made up and that are kept
    hole = W + 1  # the distance that is left out
    fill = -INF

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lost: Tensor) -> Tensor:
        rows, columns = torch.arange(W)[:, None], torch.arange(2 * W + 1)
        s = torch.einsum("bhnie,bhnje->bhnij", q.unflatten(2, (-1, W)), self.around(k))
        band = s.new_zeros(*s.shape[:-1], 2 * W + 1)
        for row in range(W):
            band[..., row, :] = s[..., row, row : row + 2 * W + 1]
        place = torch.arange(s.shape[2])[:, None, None] * W + rows + columns - W
        kept = (place >= -self.late) & (place < s.shape[2] * W) & (columns - W != self.hole)
        p = torch.where(kept, band, self.fill).softmax(-1)
        p = F.pad(p, (0, W)).flatten(-2)[..., :-W].unflatten(-1, (W, 3 * W))
        return torch.einsum("bhnij,bhnje->bhnie", p, self.around(v, self.shift)).flatten(2, 3)


class Shifted(Diagonals):
    shift = 1


class Late(Diagonals):
    late = 1


class Hole(Diagonals):
    hole = 2


class Softened(Diagonals):
    fill = -3.0


class Ring(Diagonals):
    """The first keys follow the last."""

    late = W

    def around(self, x: Tensor, shift: int = 0) -> Tensor:
        return torch.cat((x[:, :, -W:], x, x[:, :, :W]), 2).unfold(2, 3 * W, W).transpose(-1, -2)


class Blocks(Chunks):
    """Blocks of W rows over three blocks of keys, a bias by distance, and a mask of the run that is added (LongT5)."""

    beyond = False  # what the mask says of keys that padding made up
    low = -1e10

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * W + 1, 2, generator=torch.Generator().manual_seed(1)))

    def bias(self, apart: Tensor) -> Tensor:
        return F.embedding(apart.clamp(-W, W) + W, self.weight)

    def near(self, apart: Tensor) -> Tensor:
        return apart.abs() < W

    def mask(self, rows: Tensor, keys: Tensor, apart: Tensor) -> Tensor:
        return torch.logical_and(torch.logical_and(rows, keys), self.near(apart))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lost: Tensor) -> Tensor:
        apart = torch.arange(3 * W) - W - torch.arange(W)[:, None]
        kept = lost[:, 0, :, 0] < 1
        keys = F.pad(kept, (W, W), value=self.beyond).unfold(1, 3 * W, W).unsqueeze(-2)
        mask = self.mask(kept.unflatten(1, (-1, W)).unsqueeze(-1), keys, apart)
        added = torch.where(mask, 0.0, self.low).unsqueeze(1) + self.bias(apart).permute(2, 0, 1).unsqueeze(1)
        s = torch.einsum("bhnie,bhnje->bhnij", q.unflatten(2, (-1, W)), self.around(k))
        s += added
        return torch.einsum("bhnij,bhnje->bhnie", s.softmax(-1), self.around(v)).flatten(2, 3)


class Own(Blocks):
    """Each row keeps its own key."""

    def mask(self, rows: Tensor, keys: Tensor, apart: Tensor) -> Tensor:
        return torch.logical_and(torch.logical_or(keys, apart == 0), self.near(apart))


class ByPlace(Blocks):
    def bias(self, apart: Tensor) -> Tensor:
        return F.embedding(torch.arange(3 * W).expand(W, 3 * W) % (2 * W + 1), self.weight)


class Torn(Blocks):
    def near(self, apart: Tensor) -> Tensor:
        return (apart.abs() < W) & (apart != 1)


class Beyond(Blocks):
    beyond = True


class Raised(Blocks):
    low = -3.0


class Weak(Blocks):
    low = -1e9


class Half(Blocks):
    """Scores in a type that ends before the mask's number: a row without keys is NaN."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lost: Tensor) -> Tensor:
        return super().forward(q.half(), k.half(), v.half(), lost.clamp(max=0))


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (*(torch.randn(2, 2, LENGTH, 8) for _ in range(3)), torch.randn(2, 1, LENGTH, 1))


@pytest.mark.parametrize("model", [Chunks(), Diagonals()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("backward", [False, True])
def test_chunks_of_keys_are_a_window(model: nn.Module, backward: bool) -> None:
    torch._dynamo.reset()
    compiled = attnc_compiled(model, inner="eager", force="dense", strict=True)
    assert_same(run(compiled, inputs(), backward), run(model, inputs(), backward))
    (region,) = attention(attnc.last_report(compiled))
    assert region.choice.form == "dense" and region.mask == "window", region.facts["keep"]
    assert region.columns == (3 * W if type(model) is Chunks else 2 * W + 1)


LOOKALIKES = {
    Shifted: "a weight meets a constant in place of a value",
    Late: "columns of the scores that have no key hold 0, and only -inf is no weight",
    Hole: "the keys of a row are no window",
    Softened: "columns of the scores that have no key hold -3",
    Ring: "the keys of a row are no window",
}


@pytest.mark.parametrize("model, backward", [(Blocks(), False), (Own(), False), (Own(), True)])
def test_a_mask_of_the_run_in_blocks_is_a_window_with_a_bias(model: nn.Module, backward: bool) -> None:
    torch._dynamo.reset()
    compiled = attnc_compiled(model, inner="eager", force="dense", strict=True)
    assert_same(run(compiled, inputs(), backward, model), run(model, inputs(), backward))
    (region,) = attention(attnc.last_report(compiled))
    assert region.choice.form == "dense" and region.columns == 3 * W, region.choice
    assert region.shape.L == region.shape.S == LENGTH
    assert "i - j" in region.facts["keep"] and region.facts["bias"], region.facts


BLOCKS = {
    ByPlace: "a bias is no function of the distance of row and key",
    Torn: "the keys of a row are no window",
    Beyond: "columns of the scores that have no key hold 0",
    Raised: "columns of the scores that have no key hold 0",
    Half: "-1e+10 masks keys in chunks, and torch.float16 ends before it",
    Weak: "a row may lose all its keys in chunks, and -1e+09 leaves something of its scores",
    Blocks: "a row may lose all its keys in chunks, and its gradient is that of all columns",
}


@pytest.mark.parametrize("model", BLOCKS, ids=lambda m: m.__name__)
def test_blocks_that_are_no_window_stay_blocks(model: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    found, backward = [], model is Blocks
    monkeypatch.setattr(pipeline, "in_chunks", lambda *args: found.append(in_chunks(*args)) or found[-1])
    written = model()
    compiled = attnc_compiled(written, inner="eager", force="dense")
    assert_same(run(compiled, inputs(), backward, written), run(written, inputs(), backward))
    assert all(not region.columns for region in attention(attnc.last_report(compiled)))
    assert BLOCKS[model] in found[0].reason


@pytest.mark.parametrize("model", LOOKALIKES, ids=lambda m: m.__name__)
def test_what_is_no_window_stays_as_written(model: type[nn.Module]) -> None:
    torch._dynamo.reset()
    compiled = attnc_compiled(model(), inner="eager", force="dense", strict=True)
    assert_same(run(compiled, inputs()), run(model(), inputs()))
    report = attnc.last_report(compiled)
    assert not attention(report)
    assert LOOKALIKES[model] in report.unmatched[-1].reason, report.unmatched
