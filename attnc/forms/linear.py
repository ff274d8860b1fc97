"""Linear attention in place of softmax attention: a product of features where exp(scale q . k) stood.

    o_i = sum_{j kept} w_ij v_j / (sum_{j kept} w_ij + 1e-12),   w_ij = phi_q(q_i) . phi_k(k_j)

    map        w_ij, s = scale q_i . k_j
    elu1       phi(x) = elu(x) + 1, without the scale
    relu       phi(x) = max(x, 0)
    squares    s^2
    taylor     1 + s + s^2 / 2
    favor      about exp(s): `features` positive random features, their directions orthogonal and always the same
    hedgehog   phi(x) = [softmax(x W), softmax(-x W)], W supplied for queries and for keys

With `window` (LoLCATs, map hedgehog) the last `window` keys keep their softmax weights and those before get features:

    w_ij = f exp(s_ij - max_j s_ij) where i - window < j,   g phi_q(q_i) . phi_k(k_j) elsewhere,   no 1e-12

Supplied weights stand in Options.weights under the region's path or key: query_map (Hq, E, F), key_map (H or Hq, E, F),
and with a window window_factor f and linear_factor g, of Hq elements each, positive. They are inputs of the compiled
graph: it sees what an optimiser makes of them, and gradients reach those that require them when it is compiled.

Work grows with the length, not its square: causal by `attnc::recurrence`, without a mask by two products, which also
hold for a query that reads a cache of keys.

Source: Katharopoulos et al. 2020, arXiv:2006.16236 (elu + 1); Arora et al. 2024, arXiv:2402.18668 (Taylor); Aksenov et
al. 2024, arXiv:2402.10644 (squares); Choromanski et al. 2021, arXiv:2009.14794 (favor); Zhang et al. 2024,
arXiv:2402.04347 (hedgehog) and arXiv:2410.10254 (window).
Exact:  never. An approximation by name: taken only where `allow` names it. CPU, inference and training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen import feature_maps
from attnc.codegen.linear_attention import linear_attention, window_and_linear
from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device
from attnc.expr import TRUE
from attnc.expr_text import parse, spell
from attnc.forms.base import AttentionForm, Form, knob
from attnc.forms.recurrent import cost_in_chunks
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion, Region
from attnc.rule_attention import AttentionRule, AttentionShape
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

CAUSAL = parse("j <= i")
EPS = 1e-12  # beside sums of weights, which are 0 where no feature of a row is
CHUNK = 64
MAPS, FACTORS = ("query_map", "key_map"), ("window_factor", "linear_factor")

# map -> (phi of x under the scale, features of width E), of the maps without tensors
PLAIN: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[int], int]]] = {
    "elu1": (lambda x, scale: feature_maps.elu1(x), lambda E: E),
    "relu": (lambda x, scale: x.relu(), lambda E: E),
    "squares": (feature_maps.squares, lambda E: E * (E + 1) // 2),
    "taylor": (feature_maps.taylor, lambda E: 1 + E + E * (E + 1) // 2),
}


@dataclass(frozen=True)
class LinearAttention(AttentionForm):
    """A feature map and its recurrence. features: of favor; window: keys that keep their softmax, of hedgehog."""

    name: ClassVar[str] = "linear"
    approximates: ClassVar[bool] = True
    map: str = knob("elu1", "relu", "squares", "taylor", "favor", "hedgehog", role="semantic")
    features: int = knob(256, 64, 128, 512, role="semantic", unit="random features")
    window: int = knob(0, 64, 32, 128, role="semantic", unit="keys")

    @property
    def is_distinct(self) -> bool:
        return (self.map == "favor" or self.features == 256) and (self.map == "hedgehog" or self.window == 0)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the tensors that this setting needs of the user, in the order it takes them."""
        return () if self.map != "hedgehog" else MAPS + FACTORS if self.window else MAPS

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.kind != "attention":
            return f"linear computes attention, found a region of kind {region.kind}; leave it as written."
        if region.device != "cpu":
            return f"linear is lowered for the CPU only, found a region on {region.device}; use another form there."
        return self._misruled(region.rule, region.shape) or self._unsupplied(region)

    def _misruled(self, rule: AttentionRule, shape: AttentionShape) -> str | None:
        if rule.keep not in (TRUE, CAUSAL):
            return (
                f"linear sums over all keys or over those before, found the mask {spell(rule.keep)}; use block_sparse, "
                "or call the model without a mask."
            )
        if rule.keep == CAUSAL and shape.text("L") != shape.text("S"):
            return (
                f"linear needs as many queries as keys under a causal mask, found {shape.text('L')} and "
                f"{shape.text('S')}; use dense."
            )
        factor = rule.scale if rule.bias is None and rule.sink is None and rule.row is None else None
        if factor is None or factor <= 0:
            extra = " and a sink" if rule.sink is not None else " and a factor of rows" if rule.row is not None else ""
            return f"linear replaces the score factor * s, factor above 0, found {spell(rule.score)}{extra}; use dense."
        if rule.dropout:
            return f"linear keeps no random stream, found dropout {rule.dropout:g} active; use model.eval()."
        if not self.window:
            return None
        if self.map != "hedgehog":
            return f"a window of linear needs the map hedgehog, found {self.map}; use window=0."
        if rule.keep != CAUSAL or shape.symbols:
            found = f"lengths {shape.text('L')} and {shape.text('S')}" if shape.symbols else "no mask"
            return (
                f"a window of linear needs a causal mask and sizes known at compile time, found {found}; use window=0."
            )
        return None

    def _unsupplied(self, region: AttentionRegion) -> str | None:
        """Why the weights that the user supplies for `region` are not those this setting needs."""
        s, given = region.shape, dict(region.weights)
        missing = [name for name in self.weights if name not in given]
        if missing:
            need = "linear with map=hedgehog" + (f" and window={self.window}" if self.window else "")
            place = region.path or region.key
            return (
                f"{need} needs weights {', '.join(self.weights)}, found {', '.join(given) or 'none'} for {place!r}; "
                f"pass options={{'weights': {{{place!r}: {{{', '.join(f'{n!r}: ...' for n in self.weights)}}}}}}}."
            )
        width = given["query_map"][-1] if self.weights else 0
        allowed: dict[str, tuple[tuple[int, ...], ...]] = {
            "query_map": ((s.Hq, s.E, width),),
            "key_map": tuple((heads, s.E, width) for heads in dict.fromkeys((s.H, s.Hq))),
            **dict.fromkeys(FACTORS, ((s.Hq,), (1, s.Hq, 1, 1))),
        }
        for name in self.weights:
            if given[name] not in allowed[name]:
                return (
                    f"linear with map=hedgehog needs {name} of shape {' or '.join(map(_text, allowed[name]))}, found "
                    f"{_text(given[name])}; pass it in this shape."
                )
        return None

    def is_exact(self, region: AttentionRegion) -> bool:
        return False

    def tensors(self, width: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        if self.map == "favor":
            return [directions(self.features, width)]
        return [weights[name] for name in self.weights]

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        wide = self._width(region)
        rows = float(s.B * (s.Hq * s.L + s.H * s.S))
        mapped = rows * wide
        flops = 2.0 * mapped * s.E * (self.map in ("favor", "hedgehog"))
        works = [Work("composed", flops, mapped, rows * s.E * item + 2 * mapped * 4, 12)]
        if self.window:
            near = float(s.B * s.Hq * s.L) * 2 * self.window
            works.append(Work("composed", 2 * near * (s.E + s.Ev), near, 6 * near * 4, 12))
        if region.rule.keep != CAUSAL:
            heads = s.B * (s.H * s.S + s.Hq * s.L)
            works.append(Work("composed", 2.0 * heads * wide * (s.Ev + 1), 0.0, mapped * 4 + region.bytes, 4))
        if region.training:
            works += [Work(w.engine, 2 * w.flops, 2 * w.exps, 2 * w.bytes, 2 * w.launches) for w in works]
        if region.rule.keep != CAUSAL:
            return Cost(tuple(works))
        inner = RecurrenceShape(s.B, s.Hq, s.L, wide, s.Ev + 1, s.Hq)
        held = Region("", "", RecurrenceRule(chunk=CHUNK), inner, "float32", region.device, training=region.training)
        return Cost(tuple(works)) + cost_in_chunks(held, CHUNK)

    def _width(self, region: AttentionRegion) -> int:
        """Features of a query."""
        if self.map == "favor":
            return self.features
        return 2 * dict(region.weights)["query_map"][-1] if self.weights else PLAIN[self.map][1](region.shape.E)

    def cpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        """out, and the logarithm of each row's sum of weights; captured: what `tensors` gave."""
        query, key, value, captured, _, rule = given
        dtype = query.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v, *held = (x.to(wide) for x in (query, key, value, *captured))
        phi_q, phi_k = self._mapped(q, k, held, rule)
        if self.window:
            k, v, phi_k = (_by_query_head(x, q.shape[1]) for x in (k, v, phi_k))
            factors = (x.reshape(1, -1, 1, 1) for x in held[2:])
            scale = float(rule.scale or 1.0)
            out, total = window_and_linear(q, k, v, phi_q, phi_k, *factors, window=self.window, scale=scale)
            return out.to(dtype), total[..., 0].detach().log()
        counted = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        if rule.keep == CAUSAL:
            phi_k, counted = (_by_query_head(x, q.shape[1]) for x in (phi_k, counted))
            sums, _ = linear_attention(phi_q, phi_k, counted, normalise=False)
        else:
            state = phi_k.mT @ _by_query_head(counted, phi_k.shape[1])
            sums = (phi_q.unflatten(1, (phi_k.shape[1], -1)) @ state.unsqueeze(2)).flatten(1, 2)
        total = sums[..., -1:] + EPS
        return (sums[..., :-1] / total).to(dtype), total[..., 0].detach().log()

    def _mapped(self, q: Tensor, k: Tensor, held: Sequence[Tensor], rule: AttentionRule) -> tuple[Tensor, Tensor]:
        """Features of queries (B, Hq, L, F), and of keys, of H heads or of Hq where their map is by query head."""
        scale = float(rule.scale or 1.0)
        if self.map == "favor":
            omega = held[0] if held else directions(self.features, q.shape[-1]).to(q)
            q, k = q * math.sqrt(scale), k * math.sqrt(scale)
            return feature_maps.favor(q, omega, is_query=True), feature_maps.favor(k, omega, is_query=False)
        if self.map == "hedgehog":
            by_head = _by_query_head(k, held[1].shape[0])
            return feature_maps.hedgehog(q, held[0]), feature_maps.hedgehog(by_head, held[1])
        phi = PLAIN[self.map][0]
        return phi(q, scale), phi(k, scale)

    def reference(self, given: Operands) -> tuple[Tensor, Tensor]:
        """The formula in float64, every pair in memory."""
        q, k, v, held, _, rule = given.double()
        phi_q, phi_k = self._mapped(q, k, held, rule)
        k, v, phi_k = (_by_query_head(x, q.shape[1]) for x in (k, v, phi_k))
        i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
        weights = (phi_q @ phi_k.mT).masked_fill((j > i) & (rule.keep == CAUSAL), 0.0)
        if self.window:
            window_factor, linear_factor = (x.reshape(1, -1, 1, 1) for x in held[2:])
            near = (j <= i) & (j > i - self.window)
            s = (q @ k.mT * float(rule.scale or 1.0)).masked_fill(~near, -torch.inf)
            soft = window_factor * (s - s.amax(-1, keepdim=True)).exp()
            weights = torch.where(near, soft, linear_factor * weights)
        total = weights.sum(-1, keepdim=True) + (0.0 if self.window else EPS)
        return weights @ v / total, total[..., 0].log()

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        return () if self.refuse(region) else (self,)  # every knob changes results: attnc.budget searches them


def _by_query_head(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated to `heads`; as they are where there are as many already."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


@lru_cache(maxsize=64)
def directions(count: int, width: int) -> Tensor:
    """The random directions of favor, (count, width) in float64: orthogonal in blocks, of normal lengths, fixed."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu")

    blocks = []
    for _ in range(-(-count // width)):
        basis, upper = torch.linalg.qr(drawn(width, width))
        blocks.append((basis * upper.diagonal().sign()).mT)
    return torch.cat(blocks)[:count] * drawn(count, width).norm(dim=-1, keepdim=True)
