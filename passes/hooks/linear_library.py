"""What attnc's compiles trace in place of flash-linear-attention's functions, called as functions: one operator each.

Tokens stand in the second axis there: q, k (B, T, H, K), v (B, T, H, V), states (B, H, K, V). The library marks its
functions as none of Dynamo's business, so that each would break the graph. Arguments come by name, because their order
differs between releases.

Source: the public documentation of flash-linear-attention (Yang and Zhang 2024), `fla.ops`; the papers of the rows in
`attnc.forms.systems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnc.op_recurrence import RECURRENCE

NORM_EPS = 1e-6
SLOTS = 8  # of a sample
# Arguments that choose how the library computes and not what.
SCHEDULE = ("chunk_size", "checkpoint_level", "disable_recompute", "safe_gate", "auto_cp", "enable_fwd_cp_cache")


def _apply(
    rule: str,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    wanted: bool,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    given = [None if x is None else x.transpose(1, 2) for x in (q, k, v)]
    by_token = decay if decay is None or decay.dim() == 1 else decay.transpose(1, 2)
    gate = None if beta is None else beta.transpose(1, 2)
    more = (None, None) if a is None or b is None else (a.transpose(1, 2), b.transpose(1, 2))
    documents = None if cu_seqlens is None else documents_of(cu_seqlens, v.shape[1])
    packed = "" if documents is None else "; packed=True"
    out, last = RECURRENCE(
        given[0], given[1], given[2], by_token, None, gate, bonus, state, rule + packed, *more, documents
    )
    return out.transpose(1, 2), last if wanted else None


def documents_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, length): the document of each token of a row, from the positions where documents start and end."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)[None]


def _scale(scale: float | None, k: Tensor) -> float:
    return k.shape[-1] ** -0.5 if scale is None else scale


def linear(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Linear attention, divided by the sum of the weights where `normalize`."""
    scale = _scale(scale, k)
    out, state = _apply(f"scale={scale}", q, k, v, None, None, None, initial_state, output_final_state)
    if normalize:
        out = (out / ((q * scale * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10)).to(v.dtype)
    return out, state


def decayed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Decay by token, g (B, T, H), or by head, g_gamma (H,): logarithms."""
    decay, kind = (g, "token") if g is not None else (g_gamma, "head" if g_gamma is not None else "none")
    rule = f"decay='{kind}'; scale={_scale(scale, k)}"
    return _apply(rule, q, k, v, decay, None, None, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Retention: head h keeps 1 - 2^(-5 - h)."""
    heads = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
    decay = torch.log(1 - torch.exp2(-5.0 - heads))
    rule = f"decay='head'; scale={_scale(scale, k)}"
    return _apply(rule, q, k, v, decay, None, None, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def lightning(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Lightning attention: the slopes of ALiBi, weaker from layer to layer."""
    heads = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
    decay = -(8 / q.shape[2] * (1 - layer_idx / num_layers)) * heads
    rule = f"decay='head'; scale={_scale(scale, k)}"
    return _apply(rule, q, k, v, decay, None, None, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def gated(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """GLA: decay by channel, (B, T, H, K)."""
    rule = f"decay='channel'; scale={_scale(scale, k)}"
    decay = gk if g is None else g
    return _apply(rule, q, k, v, decay, None, None, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The delta rule; with g (B, T, H) gated, with g (B, T, H, K) Kimi's."""
    kind = "none" if g is None else "token" if g.dim() == 3 else "channel"
    norm = NORM_EPS if use_qk_l2norm_in_kernel else None
    rule = f"decay='{kind}'; delta=True; gate='write'; scale={_scale(scale, k)}; qk_norm={norm}"
    return _apply(rule, q, k, v, g, beta, None, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def slots(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None] | None]:  # fmt: skip
    """GSA: slots s and their decays g (B, T, H, M), logarithms; softmax over the slots between two recurrences.

    A slot of the first decays by itself: it is a head of one value that shares query and key. Without g, slots are
    averages of what came so far, weighted by exp(s).
    """
    B, T, H, M = s.shape
    if g is None:
        total = s.float().logcumsumexp(1)
        g = torch.cat([total[:, :1], total[:, :-1]], 1) - total
        s = (s - total).exp().to(k.dtype)
    by_slot = s.flatten(2)[..., None], g.flatten(2)
    rule = f"decay='token'; scale={_scale(scale, k)}"
    queries, keys = (x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    logits, first = _apply(
        rule, queries, keys, by_slot[0], by_slot[1], None, None, None, output_final_state, cu_seqlens=cu_seqlens
    )
    weights = logits.view(B, T, H, M).float().softmax(-1).to(q.dtype)
    out, last = _apply(
        "decay='channel'", weights, s, v, g, None, None, None, output_final_state, cu_seqlens=cu_seqlens
    )
    if first is None:
        return out, None
    return out, (first.view(B, H, M, -1).transpose(2, 3), last)


def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """RWKV-6: read before the update, with a bonus u (H, K) for the token itself; w (B, T, H, K) logarithms."""
    rule = f"decay='channel'; read='before'; scale={_scale(scale, k)}"
    return _apply(rule, r, k, v, w, None, u, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = 1.0,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """RWKV-7: b (a^T S) is added to the decayed state; w (B, T, H, K) logarithms."""
    rule = f"decay='channel'; low_rank=True; scale={_scale(scale, k)}"
    return _apply(rule, r, k, v, w, None, None, initial_state, output_final_state, a, b, cu_seqlens)


def hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """HGRN: x and g (B, T, D), g logarithms; state (B, D)."""
    state = None if initial_state is None else initial_state[..., None, None]
    rule = "decay='token'"
    out, last = _apply(
        rule, None, None, x[..., None], g, None, None, state, output_final_state, cu_seqlens=cu_seqlens
    )
    return out[..., 0], last[..., 0, 0] if last is not None else None


def unfit(known: Callable[..., Any]) -> Callable[[Mapping[str, Any]], str | None]:
    """Refuses calls with arguments that the substitute `known` does not have, unless they are off."""
    names = {*known.__code__.co_varnames[: known.__code__.co_argcount], *SCHEDULE}

    def refuse(arguments: Mapping[str, Any]) -> str | None:
        for name, value in arguments.items():
            if name not in names and not (value is None or value is False):
                return f"its argument {name} is given, and the operator has no setting for it"
        if arguments.get("cu_seqlens") is not None:
            if arguments.get("initial_state") is not None or arguments.get("output_final_state"):
                return "it has a state for each packed sequence, and the operator has one in all"
            if not isinstance(arguments["cu_seqlens"], Tensor):
                return "its cu_seqlens is no tensor"
        beta = arguments.get("beta")
        if isinstance(beta, Tensor) and beta.dim() != 3:
            return "its beta differs over the values of a head"
        return None

    return refuse


def sample(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """A few tokens of two heads of 16, on the device of the call; gradients where the call has them."""
    packed = arguments.get("cu_seqlens") is not None
    B, T, H, D = 1 if packed else 2, 21, 2, 16
    pairs = dict.fromkeys(("q", "k", "v", "r", "w", "a", "b", "gk"), (B, T, H, D))
    shapes: dict[str, tuple[int, ...]] = {**pairs, "beta": (B, T, H), "u": (H, D), "g_gamma": (H,), "x": (B, T, D)}
    shapes |= {"s": (B, T, H, SLOTS), "g": (B, T, H, SLOTS)} if "s" in arguments else {}
    drawn = dict(arguments)
    for name, given in arguments.items():
        if not isinstance(given, Tensor):
            continue
        if name == "cu_seqlens":
            drawn[name] = torch.tensor([0, 5, 6, T], dtype=given.dtype, device=given.device)
            continue
        shape = shapes.get(name, {2: (B, D), 3: (B, T, D if "x" in arguments else H), 4: (B, T, H, D)}[given.dim()])
        if name == "initial_state" and given.dim() == 4:
            shape = (B, H, D, D)
        x = torch.randn(shape, generator=g)
        if name in ("g", "gk", "w", "g_gamma"):
            x = -x.abs() * 0.5 - 0.02
        elif name == "beta":
            x = x.sigmoid()
        elif name in ("q", "k", "a", "b"):
            x = x / math.sqrt(D)
        drawn[name] = x.to(given.device, given.dtype).requires_grad_(given.requires_grad)
    return drawn
