"""Whole blocks written with torch.nn alone, as papers' own code has them, and the regions each one holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, FF = 32, 4, 64


class FeedForward(nn.Sequential):
    def __init__(self, act: type[nn.Module] = nn.GELU, width: int = FF) -> None:
        super().__init__(nn.Linear(D, width), act(), nn.Dropout(0.0), nn.Linear(width, D))


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


class DiTBlock(nn.Module):
    """Peebles and Xie 2022: attention and feed-forward under shift, scale and gate from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = FeedForward(lambda: nn.GELU(approximate="tanh"))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        h = self.norms[0](x) * (1 + scale1) + shift1
        q, k, v = map(split_heads, self.qkv(h).chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(h)
        h = self.norms[1](x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


class SwinBlock(nn.Module):
    """Liu et al. 2021: attention in shifted windows of an image, with a table of relative biases and a region mask."""

    def __init__(self, side: int = 8, window: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), FeedForward()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, HEADS))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        self.register_buffer("mask", self._mask())

    def _mask(self) -> Tensor:
        parts = torch.zeros(self.side, self.side)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for a, rows in enumerate(cuts):
            for b, columns in enumerate(cuts):
                parts[rows, columns] = 3 * a + b
        parts = self._windows(parts[None, :, :, None]).flatten(1)
        return torch.where(parts[:, None] != parts[:, :, None], -100.0, 0.0)

    def _windows(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window
        return x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window
        h = self._windows(torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)))
        q, k, v = self.qkv(h).view(-1, w * w, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q * (C // HEADS) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(w * w, w * w, HEADS).permute(2, 0, 1)
        n = self.mask.shape[0]
        scores = (scores.view(B, n, HEADS, w * w, w * w) + self.mask[None, :, None]).view(-1, HEADS, w * w, w * w)
        h = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, C))
        h = h.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        x = x + torch.roll(h, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Perceiver(nn.Module):
    """Jaegle et al. 2021: learned latents read a long input, then themselves; keys twice as wide as latents."""

    def __init__(self, latents: int = 12) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, D))
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(2 * D, 2 * D), nn.Linear(D, D)
        self.own, self.own_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.cross_mlp, self.self_mlp = FeedForward(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        h = self.latents.expand(x.shape[0], -1, -1)
        k, v = self.kv(x).chunk(2, -1)
        scores = torch.einsum("bhid,bhjd->bhij", split_heads(self.q(h)), split_heads(k)) * (D // HEADS) ** -0.5
        read = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), split_heads(v))
        h = h + self.out(read.transpose(1, 2).flatten(2))
        h = h + self.cross_mlp(h)
        q, k, v = map(split_heads, self.own(h).chunk(3, -1))
        read = ((q @ k.mT) / (D // HEADS) ** 0.5).softmax(-1) @ v
        h = h + self.own_out(read.transpose(1, 2).flatten(2))
        return h + self.self_mlp(h)


class ConformerBlock(nn.Module):
    """Gulati et al. 2020: half steps of feed-forward around attention with relative positions and a convolution.

    The module of the convolution is no feed-forward: it reads 7 tokens, and a norm over the batch stands in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = FeedForward(nn.SiLU), FeedForward(nn.SiLU)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.q, self.k, self.v, self.out, self.at = (nn.Linear(D, D) for _ in range(5))
        self.content, self.place = (nn.Parameter(torch.randn(HEADS, 1, D // HEADS)) for _ in range(2))
        self.up, self.down = nn.Conv1d(D, 2 * D, 1), nn.Conv1d(D, D, 1)
        self.deep, self.batch = nn.Conv1d(D, D, 7, padding=3, groups=D), nn.BatchNorm1d(D)

    def _attend(self, x: Tensor, places: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        p = split_heads(self.at(places))
        B, H, L, _ = q.shape
        shifted = F.pad((q + self.place) @ p.mT, (1, 0)).view(B, H, -1, L)[:, :, 1:].reshape(B, H, L, -1)[..., :L]
        scores = ((q + self.content) @ k.mT + shifted) / (D // HEADS) ** 0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self._attend(self.norms[0](x), places)
        h = self.deep(F.glu(self.up(self.norms[1](x).mT), 1))
        x = x + self.down(F.silu(self.batch(h))).mT
        x = x + 0.5 * self.last(self.norms[2](x))
        return self.norms[3](x)


class UNetAttention(nn.Module):
    """Attention over the pixels of a feature map, projections as 1x1 convolutions (Ho et al. 2020), packed or apart."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.norm, self.out = nn.GroupNorm(4, D), nn.Conv2d(D, D, 1)
        self.qkv = nn.ModuleList([nn.Conv2d(D, 3 * D, 1)] if packed else [nn.Conv2d(D, D, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = torch.cat([f(h) for f in self.qkv], 1).view(B, 3, HEADS, C // HEADS, H * W).unbind(1)
        scale = (C // HEADS) ** -0.25  # of each of q and k
        weights = torch.einsum("bhdi,bhdj->bhij", q * scale, k * scale).softmax(-1)
        read = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(B, C, H, W)
        return x + self.out(read)


class Seq2Seq(nn.Module):
    """nn.Transformer whole: encoder, decoder with a causal mask, cross attention."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.inner = nn.Transformer(
            D, HEADS, 2, 2, FF, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.inner(source, target, tgt_mask=mask, tgt_is_causal=True)


@dataclass(frozen=True)
class Whole:
    """A block, inputs for it, how many regions of each kind it holds, and reasons for which parts are none."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    holds: dict[str, int]
    refused: tuple[str, ...] = ()


def images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, *shape),)


WHOLES = {
    "dit": Whole(DiTBlock, lambda: (torch.randn(2, 33, D), torch.randn(2, D)), {"attention": 1, "ffn": 1}),
    "swin": Whole(SwinBlock, images(8, 8, D), {"attention": 1, "ffn": 1}),
    "perceiver": Whole(Perceiver, images(70, 2 * D), {"attention": 2, "ffn": 2}),
    "conformer": Whole(
        ConformerBlock,
        lambda: (torch.randn(2, 33, D), torch.randn(1, 33, D)),
        {"attention": 1, "ffn": 2},
        ("a convolution over the tokens stands between two activations",),
    ),
    "unet_packed": Whole(lambda: UNetAttention(packed=True), images(D, 6, 5), {"attention": 1}),
    "unet": Whole(lambda: UNetAttention(packed=False), images(D, 6, 5), {"attention": 1}),
    "transformer": Whole(
        lambda: Seq2Seq(norm_first=False),
        lambda: (torch.randn(2, 33, D), torch.randn(2, 17, D)),
        {"attention": 6, "ffn": 4},
    ),
    "transformer_norm_first": Whole(
        lambda: Seq2Seq(norm_first=True),
        lambda: (torch.randn(2, 33, D), torch.randn(2, 17, D)),
        {"attention": 6, "ffn": 4},
    ),
}
