"""Work whose result nothing uses is named where it ends; work that is used, and writes, are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnc


class Streams(nn.Module):
    """Two streams of attention and feed-forward; `used`: whether the second one's result counts."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.used = used
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = nn.functional.scaled_dot_product_attention(x, x, x)
        second = self.down(self.up((y @ y.mT).softmax(-1) @ y).relu())
        return first + second if self.used else first


def unmatched(model: nn.Module) -> list:
    return list(attnc.explain(model, torch.randn(2, 4, 16), torch.randn(2, 4, 16)).unmatched)


def test_a_result_that_nothing_uses_is_named_with_what_stands_behind_it() -> None:
    (entry,) = unmatched(Streams(used=False))
    assert entry.reason == (
        "nothing uses its result, so it and 4 products and 1 softmaxes behind it are not computed"
    )
    assert not unmatched(Streams(used=True))


def test_running_statistics_are_a_use() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(self.inner(self.inner(x[0])))
            return x + 1

    assert not list(attnc.explain(Normed().train(), torch.randn(2, 4, 16)).unmatched)


def test_a_write_is_a_use() -> None:
    class Writes(Streams):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y.copy_(self.up(x) @ self.up(x).mT @ y)
            x[0] = (x @ x.mT)[0] @ x[0]
            z = y.view(-1)
            z += self.down(self.up(x)).sum()
            return x

    assert not unmatched(Writes(used=False))
