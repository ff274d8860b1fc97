"""What attnc's compiles trace in place of loops over the experts that were hit: sorted rows and grouped products.

A loop over `nonzero` breaks the graph at each expert. The substitutes compute the same sums over all chosen experts
with transformers' own grouped product, which touches active experts only and copies no weights of theirs; they are
traced by Dynamo. Where a library keeps each expert as a module of its own, its weights are stacked on the way.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.passes.hooks.hook import Arguments, Hook

INTERFACE = "transformers.integrations.moe"
TOKENS, SLOTS, WIDTH, INNER = 5, 2, 16, 8
BACKWARD = "_grouped_mm_fallback_backward_fake"  # of the interface: shapes of the grouped product's backward
ALIGNED = 16


@dataclass(frozen=True)
class InterfaceHook(Hook):
    """The row for every class that transformers' experts interface decorates: their own, eager, forward."""

    def covers(self, function: FunctionType) -> bool:
        owner = getattr(sys.modules.get(function.__module__ or ""), function.__qualname__.partition(".")[0], None)
        outer = vars(owner).get("forward") if isinstance(owner, type) else None
        decorated = isinstance(outer, FunctionType) and outer.__globals__.get("__name__") == INTERFACE
        return decorated and getattr(outer, "__wrapped__", None) is function


# --------------------------------------------------------------------------------------------------------------------
# Substitutes
# --------------------------------------------------------------------------------------------------------------------


def by_interface(self: Any, hidden_states: Tensor, *chosen: Tensor, **named: Tensor) -> Tensor:
    """hidden_states (T, D), expert ids and weights (T, k), whatever a class calls them."""
    ids, weights = (*chosen, *named.values())
    return sys.modules[INTERFACE].grouped_mm_experts_forward(self, hidden_states, ids, weights)


class Groups:
    """Rows of (token, slot) pairs in the order of their experts, and where each expert's rows end."""

    def __init__(self, ids: Tensor, count: int) -> None:
        flat = ids.reshape(-1)
        self.slots = ids.shape[-1]
        self.experts, self.order = torch.sort(flat)
        # On the CPU, histc takes floats only.
        counted = self.experts.float() if flat.device.type == "cpu" else self.experts.int()
        self.ends = torch.cumsum(torch.histc(counted, bins=count, min=0, max=count - 1), 0, dtype=torch.int32)

    def rows(self, x: Tensor) -> Tensor:
        """x (T, D) by row."""
        return x[self.order // self.slots]

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows (T k, in) with weight (N, in, out), one matrix for each group."""
        return sys.modules[INTERFACE]._grouped_mm(rows, weight, offs=self.ends)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's rows; weights (T, k)."""
        rows = rows * weights.reshape(-1)[self.order][:, None]
        return rows[torch.argsort(self.order)].view(weights.shape[0], self.slots, -1).sum(1)


def dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DbrxExperts: all experts' weights one below the other."""
    batch = hidden_states.shape[0]
    x = hidden_states.reshape(-1, self.hidden_size)
    groups = Groups(top_k_index, self.num_experts)
    shape = (-1, self.ffn_hidden_size, self.hidden_size)
    rows, mlp = groups.rows(x), self.mlp
    gate = groups.product(rows, mlp.w1.view(shape).transpose(1, 2))
    up = groups.product(rows, mlp.v1.view(shape).transpose(1, 2))
    y = groups.product(mlp.activation_fn(gate) * up, mlp.w2.view(shape))
    return groups.combine(y, top_k_weights).to(x.dtype).view(batch, -1, self.hidden_size)


def longcat(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongcatFlashExperts: classes beyond the experts hand the token on."""
    beyond = top_k_index >= self.num_routed_experts
    handed = hidden_states * (top_k_weights * beyond).sum(-1, keepdim=True)
    if self.gate_up_proj is None:
        return handed.to(hidden_states.dtype)
    ids, weights = top_k_index.masked_fill(beyond, 0), top_k_weights.masked_fill(beyond, 0.0)
    groups = Groups(ids, self.num_routed_experts)
    joint = groups.product(groups.rows(hidden_states), self.gate_up_proj[: self.num_routed_experts].transpose(1, 2))
    gate, up = joint.chunk(2, dim=-1)
    y = groups.product(self.act_fn(gate) * up, self.down_proj.transpose(1, 2))
    return (groups.combine(y, weights) + handed).to(hidden_states.dtype)


def switch(self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """SwitchTransformersExperts: selected_experts (T, 1, N), one or nothing in each row, routing_weights (T, 1)."""
    chosen = selected_experts[:, 0]
    experts = list(self.values())
    groups = Groups(chosen.argmax(-1, keepdim=True), len(experts))
    first = torch.stack([e.wi.weight for e in experts]).transpose(1, 2)
    second = torch.stack([e.wo.weight for e in experts]).transpose(1, 2)
    y = groups.product(experts[0].act(groups.product(groups.rows(hidden_states), first)).to(second.dtype), second)
    return groups.combine(y, routing_weights * chosen.sum(-1, keepdim=True)).to(hidden_states.dtype)


def nllb(self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """NllbMoeExperts: the mask's values, 0 and 1, are taken for expert numbers, so that two experts see all tokens."""
    out = torch.zeros_like(hidden_states)
    kept = 1 - self.moe_token_dropout if self.moe_token_dropout > 0 else 1
    for number, expert in enumerate(list(self.values())[:2]):
        weight = (router_probs * (router_mask == number)).sum(-1, keepdim=True)
        out = out + (expert(hidden_states) * weight * kept).to(hidden_states.dtype)
    return out


class Sizes:
    """Rows of each expert; stands where a list of numbers stood."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts


def jetmoe_gating(self: Any, hidden_states: Tensor) -> tuple[Any, ...]:
    """JetMoeTopKGating: rows sorted by expert; their counts stay a tensor."""
    logits = self.layer(hidden_states).float()
    top, ids = logits.topk(self.top_k, dim=1)
    gates = torch.softmax(top, dim=1).type_as(hidden_states)
    experts, order = ids.flatten().sort(0)
    counted = experts.float() if ids.device.type == "cpu" else experts.int()
    counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
    token = order.div(self.top_k, rounding_mode="trunc")
    return order, token, gates.flatten()[order], Sizes(counts), logits


def jetmoe_experts(self: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """JetMoeParallelExperts: inputs sorted by expert, weight (N, out, in)."""
    counts = expert_size.counts if isinstance(expert_size, Sizes) else torch.tensor(expert_size, device=inputs.device)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    weight = self.weight.transpose(1, 2)
    if any(s * weight.element_size() % ALIGNED for s in weight.shape[1:]):  # the gating has no way back
        return sys.modules[INTERFACE]._grouped_mm(inputs.float(), weight.float(), offs=ends).to(inputs.dtype)
    return sys.modules[INTERFACE]._grouped_mm(inputs, weight, offs=ends)


# --------------------------------------------------------------------------------------------------------------------
# Why not
# --------------------------------------------------------------------------------------------------------------------


def unfit(arguments: Arguments) -> str | None:
    """Grouped products of narrow types take rows of whole 16 bytes."""
    for name, weight in arguments["self"].named_parameters():
        odd = [s for s in weight.shape[-2:] if s * weight.element_size() % ALIGNED]
        if weight.dim() > 1 and weight.dtype != torch.float32 and odd:
            return f"{name} has a side of {odd[0]} numbers, grouped products take multiples of {ALIGNED} bytes"
    if torch.is_grad_enabled() and not hasattr(sys.modules.get(INTERFACE), BACKWARD):
        return "this transformers' grouped product has a backward that cannot be traced; newer ones train in one graph"
    return drops(arguments)


def drops(arguments: Arguments) -> str | None:
    """Dropout inside the experts draws its numbers expert by expert."""
    module = arguments["self"]
    if module.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
        return "dropout is active inside the experts, and sorted rows would draw other numbers; set it to 0"
    return None


# --------------------------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------------------------


def smaller(module: nn.Module, sizes: Mapping[int, int], g: torch.Generator) -> nn.Module:
    """A copy with lengths replaced everywhere, in shapes and in attributes, and random parameters on the CPU."""
    twin = copy.copy(module)
    twin.__dict__ = {name: _sized(value, sizes) for name, value in vars(module).items()}
    drawn = {name: None if p is None else _drawn(p, sizes, g) for name, p in module._parameters.items()}
    twin._parameters = {name: None if p is None else nn.Parameter(p) for name, p in drawn.items()}
    twin._buffers = {name: None if b is None else _drawn(b, sizes, g) for name, b in module._buffers.items()}
    twin._modules = {name: None if m is None else smaller(m, sizes, g) for name, m in module._modules.items()}
    return twin


def _sized(value: Any, sizes: Mapping[int, int]) -> Any:
    plain = isinstance(value, int) and not isinstance(value, bool)
    return sizes.get(value, value) if plain else value


def _drawn(x: Tensor, sizes: Mapping[int, int], g: torch.Generator) -> Tensor:
    shape = [sizes.get(int(s), int(s)) for s in x.shape]
    return (torch.randn(shape, generator=g) * (shape[-1] if shape else 1) ** -0.5).to(x.dtype)


def _small(arguments: Arguments, inner: int, count: int, g: torch.Generator) -> dict[str, Any]:
    """The module with small widths, and a few tokens; `inner`, `count`: the experts' width, and their number."""
    first = next(name for name, x in arguments.items() if isinstance(x, Tensor))
    width = int(arguments[first].shape[-1])
    sizes = {width: WIDTH, inner: INNER, 2 * inner: 2 * INNER, inner * count: INNER * count}
    sizes = {} if count in sizes else sizes  # then lengths cannot be told from the number of experts
    module = smaller(arguments["self"], sizes, g)
    x = torch.randn(TOKENS, sizes.get(width, width), generator=g).to(arguments[first].dtype)
    return {**arguments, "self": module, first: x.requires_grad_()}


def stacked(arguments: Arguments, g: torch.Generator) -> dict[str, Any]:
    """hidden_states (T, D), ids and weights (T, k) for a module with `down_proj`."""
    real = arguments["self"]
    count = int(real.num_experts)
    inner = int(real.down_proj.shape[1 if real.is_transposed else 2])
    return _routed(_small(arguments, inner, count, g), count, g)


def _routed(small: dict[str, Any], count: int, g: torch.Generator) -> dict[str, Any]:
    """Ids below `count` and weights in place of the last two tensors; no token has an expert twice."""
    *_, ids, weights = (name for name, x in small.items() if isinstance(x, Tensor))
    tokens = small[next(name for name, x in small.items() if isinstance(x, Tensor))].shape[0]
    scores = torch.rand(tokens, count, generator=g)
    dtype = small[weights].dtype
    small[ids] = scores.topk(min(SLOTS, count), dim=-1).indices
    small[weights] = torch.rand(small[ids].shape, generator=g).to(dtype).requires_grad_()
    return small


def dbrx_sample(arguments: Arguments, g: torch.Generator) -> dict[str, Any]:
    """hidden_states (B, L, D)."""
    real = arguments["self"]
    small = _routed(_small(arguments, real.ffn_hidden_size, real.num_experts, g), real.num_experts, g)
    return {**small, "hidden_states": small["hidden_states"].detach()[None].requires_grad_()}


def longcat_sample(arguments: Arguments, g: torch.Generator) -> dict[str, Any]:
    """Ids beyond the experts too."""
    real = arguments["self"]
    inner = int(real.intermediate_size)
    return _routed(_small(arguments, inner, real.num_routed_experts, g), real.total_experts, g)


def switch_sample(arguments: Arguments, g: torch.Generator) -> dict[str, Any]:
    """selected_experts (T, 1, N): one in each row but the last, routing_weights (T, 1)."""
    experts = list(arguments["self"].values())
    small = _small(arguments, int(experts[0].wi.weight.shape[0]), len(experts), g)
    ids = torch.randint(0, len(experts), (TOKENS,), generator=g)
    small["selected_experts"] = F.one_hot(ids, len(experts))[:, None].clone()
    small["selected_experts"][-1] = 0
    dtype = arguments["routing_weights"].dtype
    small["routing_weights"] = torch.rand(TOKENS, 1, generator=g).to(dtype).requires_grad_()
    return small


def nllb_sample(arguments: Arguments, g: torch.Generator) -> dict[str, Any]:
    """router_mask (T, N) of zeros and one, router_probs (T, N)."""
    experts = list(arguments["self"].values())
    small = _small(arguments, int(experts[0].fc1.weight.shape[0]), len(experts), g)
    ids = torch.randint(0, len(experts), (TOKENS,), generator=g)
    small["router_mask"] = F.one_hot(ids, len(experts))
    dtype = arguments["router_probs"].dtype
    small["router_probs"] = torch.rand(TOKENS, len(experts), generator=g).to(dtype).requires_grad_()
    return small


def jetmoe_gating_sample(arguments: Arguments, g: torch.Generator) -> dict[str, Any]:
    """hidden_states (T, D)."""
    return _small(arguments, -1, 1, g)


def jetmoe_experts_sample(arguments: Arguments, g: torch.Generator) -> dict[str, Any]:
    """inputs (R, in) and the number of rows of each expert."""
    small = _small(arguments, -1, 1, g)
    counts = [0] * int(arguments["self"].num_experts)
    for row in range(TOKENS):
        counts[(3 * row) % len(counts)] += 1
    return {**small, "expert_size": counts}
