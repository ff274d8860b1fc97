"""What attnc's compiles trace in place of mamba_ssm's functions, called as functions: one operator each.

Arguments come by name, because releases add some. The library computes in float32 and returns the dtype of its values.

Source: the public documentation of mamba_ssm (Gu and Dao 2023, arXiv:2312.00752; Dao and Gu 2024, arXiv:2405.21060),
`selective_scan_fn`, `mamba_chunk_scan_combined`, `selective_state_update`.
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
        A, B = arguments["A"], arguments["B"]
        if A.is_complex() or B.is_complex():
            return "its decays are complex"
        if known is selective_scan and min(B.dim(), arguments["C"].dim()) < 3:
            return "its B or C are the same for all tokens"
        if known is state_update and arguments["state"].dim() == 4:
            return samples.equal_over_heads(arguments) or unknown(arguments)
        return unknown(arguments)

    return refuse


def sampled(known: Callable[..., Any]) -> Callable[[Mapping[str, Any], torch.Generator], dict[str, Any]]:
    """Small arguments on the device of the call, where the library's kernels are."""

    def sample(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
        draw: Callable[..., dict[str, Any]] = {
            selective_scan: samples.selective_scan,
            chunk_scan: samples.chunk_scan,
        }.get(known, samples.selective_state_update)
        if known is state_update and arguments["state"].dim() == 4:
            draw = samples.chunk_state_update
        drawn, device = draw(arguments, g), arguments["A"].device
        tensors = {name: x for name, x in drawn.items() if isinstance(x, Tensor)}
        return drawn | {n: x.detach().to(device).requires_grad_(x.requires_grad) for n, x in tensors.items()}

    return sample
