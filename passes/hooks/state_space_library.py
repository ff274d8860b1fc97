"""What attnc's compiles trace in place of the functions of mamba_ssm and causal_conv1d, called as functions.

A scan becomes one operator, a short convolution the sum of its few taps. Arguments come by name, because releases add
some. The libraries compute in float32 and return the dtype of their values.

Source: the public documentation of mamba_ssm (Gu and Dao 2023, arXiv:2312.00752; Dao and Gu 2024, arXiv:2405.21060),
`selective_scan_fn`, `mamba_chunk_scan_combined`, `mamba_split_conv1d_scan_combined`, `selective_state_update`; of
causal_conv1d, `causal_conv1d_fn`, `causal_conv1d_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.op_recurrence import RECURRENCE
from attnc.passes.hooks import samples
from attnc.passes.hooks import state_space as spaces
from attnc.passes.hooks.linear_library import unfit


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba: u, delta, z (B, D, L), A (D, N), B, C (B, N, L) or (B, G, N, L) -> (B, D, L), last state (B, D, N)."""
    bias = None if delta_bias is None else delta_bias.float()[:, None]
    steps = spaces.steps_of(delta.float(), bias, delta_softplus)
    keys, queries = ((x[:, None] if x.dim() == 3 else x).transpose(2, 3) for x in (B, C))
    rule = "decay='state'; gate='write'; out='state'"
    out, state = RECURRENCE(queries, keys, u[..., None], steps, A, steps, None, None, rule)
    out = _finished(out.squeeze(-1), u, None if D is None else D[:, None], z)
    return (out, state.squeeze(-1)) if return_last_state else out


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2: x, z (B, L, H, P), dt (B, L, H), A (H,), D (H,) or (H, P), B, C (B, L, G, N), seq_idx (B, L): sequences
    in a row; states (B, H, P, N)."""
    bias = None if dt_bias is None else dt_bias.float()
    steps = torch.clamp(spaces.steps_of(dt.float(), bias, dt_softplus), min=dt_limit[0], max=dt_limit[1])
    decay = (A.float() * steps).transpose(1, 2)
    initial = None if initial_states is None else initial_states.transpose(2, 3)
    q, k, v, w = (t.transpose(1, 2) for t in (C, B, x, steps))
    packed = "" if seq_idx is None else "; packed=True"
    rule = f"decay='token'; gate='write'; chunk={chunk_size}; out='state'{packed}"
    out, state = RECURRENCE(q, k, v, decay, None, w, None, initial, rule, None, None, seq_idx)
    skip = D if D is None or D.dim() == 2 else D[:, None]
    out = _finished(out.transpose(1, 2), x, skip, z)
    return (out, state.transpose(2, 3)) if return_final_states else out


def state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """One token: of Mamba where the state is (B, D, N), of Mamba-2 where it is (B, H, P, N); it is overwritten."""
    step = spaces.selective_state_update if state.dim() == 3 else spaces.chunk_state_update
    return step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z)


def split_scan(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
    activation: str | None = "silu", rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None, headdim: int | None = None,
    ngroups: int = 1, norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A whole block of Mamba-2 after its first projection: zxbcdt (B, L, 2 M + 2 H P + 2 G N + H) holds M gated units
    beside the scan, its gate, what is convolved, its steps; the norm is by group, (H P / G) wide; out (B, L, M + H P)
    or as wide as the rows of outproj_weight; states (B, H, P, N)."""
    heads, width = D.shape[0], D.shape[1] if D.dim() == 2 else (headdim or 1)
    inner, (convolved, taps) = heads * width, conv1d_weight.shape
    beside = (zxbcdt.shape[-1] - inner - convolved - heads) // 2
    units, gate, taken, dt = zxbcdt.split([2 * beside, inner, convolved, heads], -1)
    tokens = F.pad(taken.transpose(1, 2), (taps - 1, 0))
    taken = _taps(tokens, conv1d_weight, conv1d_bias, activation, seq_idx).to(zxbcdt.dtype).transpose(1, 2)
    keys = (convolved - inner) // 2
    x, B, C = taken.split([inner, keys, keys], -1)
    x, B, C = x.unflatten(-1, (heads, width)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    z = gate.unflatten(-1, (heads, width)) if rmsnorm_weight is None else None
    out, state = chunk_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, True, dt_limit, return_final_states=True
    )
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = _gated_norm(out, gate, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    if beside:
        first, second = units.float().chunk(2, -1)
        out = torch.cat([(F.silu(first) * second).to(out.dtype), out], -1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, state) if return_final_states else out


def _gated_norm(out: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, before: bool) -> Tensor:
    """The root mean square of each group is made 1, `before` the gate or after it."""
    given, by = out.float(), F.silu(gate.float())
    given = given if before else given * by
    normed = F.rms_norm(given.unflatten(-1, (groups, -1)), (given.shape[-1] // groups,), eps=eps).flatten(-2)
    normed = normed * weight.float()
    return (normed * by if before else normed).to(out.dtype)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Each channel's own sum over the last W tokens: x (B, D, L), weight (D, W), bias (D,), states (B, D, W - 1);
    seq_idx (B, L): sequences in a row, below zero where there is none and the output is zero."""
    before = weight.shape[1] - 1
    tokens = F.pad(x, (before, 0)) if initial_states is None else torch.cat([initial_states.to(x.dtype), x], -1)
    out = _taps(tokens, weight, bias, activation, seq_idx).to(x.dtype)
    return (out, tokens[..., tokens.shape[-1] - before :]) if return_final_states else out


def convolution_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """The next tokens of it, x (B, D) or (B, D, L), after the last ones, conv_state (B, D, W - 1 or more), which is
    overwritten."""
    given = x[..., None] if x.dim() == 2 else x
    tokens = torch.cat([conv_state.to(x.dtype), given], -1)
    conv_state.copy_(tokens[..., given.shape[-1] :])
    read = tokens[..., conv_state.shape[-1] - weight.shape[1] + 1 :]
    return _taps(read, weight, bias, activation, None).to(x.dtype).view(x.shape)


def _taps(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, documents: Tensor | None
) -> Tensor:
    """(B, D, L) in float32 of W - 1 + L tokens: W products that one loop computes, where a depthwise convolution of
    torch is a call of its own."""
    taps, length = weight.shape[1], tokens.shape[-1] - weight.shape[1] + 1
    names = None if documents is None else F.pad(documents, (taps - 1, 0), value=-1)
    out = tokens.new_zeros((), dtype=torch.float32) if bias is None else bias.float()[:, None]
    for tap in range(taps):
        term = tokens[..., tap : tap + length].float() * weight[:, tap, None].float()
        if names is not None and documents is not None:
            term = term * names[:, tap : tap + length].eq(documents)[:, None]
        out = out + term
    out = out if activation is None else F.silu(out)
    return out if documents is None else out * (documents >= 0)[:, None]


def _finished(out: Tensor, given: Tensor, skip: Tensor | None, z: Tensor | None) -> Tensor:
    """The values beside the state, and the gate, in float32; then the dtype of the values."""
    if skip is not None:
        out = out + given.float() * skip.float()
    if z is not None:
        out = out * F.silu(z.float())
    return out.to(given.dtype)


def refused(known: Callable[..., Any]) -> Callable[[Mapping[str, Any]], str | None]:
    """As `linear_library.unfit`, and what else the operator has no setting for."""
    unknown = unfit(known)

    def refuse(arguments: Mapping[str, Any]) -> str | None:
        if any(isinstance(arguments.get(name), Tensor) and arguments[name].is_complex() for name in "AB"):
            return "its decays are complex"
        if arguments.get("activation") not in (None, "silu", "swish"):
            return f"its activation is {arguments['activation']!r}, and silu is the one it has"
        if known is selective_scan and min(arguments["B"].dim(), arguments["C"].dim()) < 3:
            return "its B or C are the same for all tokens"
        if known is state_update and arguments["state"].dim() == 4:
            return samples.equal_over_heads(arguments) or unknown(arguments)
        return unknown(arguments)

    return refuse


_SAMPLES: dict[Callable[..., Any], Callable[..., dict[str, Any]]] = {
    selective_scan: samples.selective_scan,
    chunk_scan: samples.chunk_scan,
    split_scan: samples.split_scan,
    state_update: samples.selective_state_update,
    convolution: samples.convolution,
    convolution_step: samples.convolution_step,
}


def sampled(known: Callable[..., Any]) -> Callable[[Mapping[str, Any], torch.Generator], dict[str, Any]]:
    """Small arguments on the device of the call, where the library's kernels are."""

    def sample(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
        draw = _SAMPLES[known]
        if known is state_update and arguments["state"].dim() == 4:
            draw = samples.chunk_state_update
        drawn = draw(arguments, g)
        device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
        tensors = {name: x for name, x in drawn.items() if isinstance(x, Tensor)}
        return drawn | {n: x.detach().to(device).requires_grad_(x.requires_grad) for n, x in tensors.items()}

    return sample
