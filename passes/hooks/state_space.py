"""What attnc's compiles trace in place of the scans of state space models: Mamba and Mamba-2, whole and by one token.

As in `passes.hooks.recurrence`, each function takes what the library's takes and gives what it gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.op_recurrence import RECURRENCE


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba: hidden_states, dt, z (B, D, L), A (D, N), B, C (B, N, L) -> (B, D, L), last state (B, D, N)."""
    bias = None if delta_bias is None else delta_bias[..., None]
    steps = steps_of(dt, bias, delta_softplus)
    keys, queries = B.transpose(1, 2)[:, None], C.transpose(1, 2)[:, None]
    out, state = _mamba(hidden_states[..., None], steps, A, keys, queries, None)
    scanned = out.squeeze(-1)
    if D is not None:
        scanned = scanned + hidden_states * D[None, :, None]
    if z is not None:
        scanned = scanned * F.silu(z)
    return (scanned, state.squeeze(-1)) if return_last_state else scanned


def selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One token of Mamba: hidden_states, dt, z (B, D), A (D, N), B, C (B, N); state (B, D, N) is overwritten."""
    steps = steps_of(dt, dt_bias, dt_softplus)
    out, last = _mamba(
        hidden_states[..., None, None], steps[..., None], A, B[:, None, None], C[:, None, None], state[..., None]
    )
    state.copy_(last.squeeze(-1))
    out = out[..., 0, 0]
    if D is not None:
        out = out + hidden_states * D
    if z is not None:
        out = out * F.silu(z)
    return out.to(hidden_states.dtype)


def steps_of(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Step sizes of a state space, discretised as written."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _mamba(
    value: Tensor, steps: Tensor, A: Tensor, keys: Tensor, queries: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    rule = "decay='state'; gate='write'"
    if steps.dtype == torch.float64:  # the only one that is not computed in float32
        rule = "decay='state'; gate='write'; state='float64'"
    return RECURRENCE(queries, keys, value, steps, A, steps, None, initial, rule)


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2: hidden_states (B, L, H, P), dt (B, L, H), A (H,), B, C (B, L, G, N); states (B, H, P, N)."""
    steps = torch.clamp(steps_of(dt, dt_bias, dt_softplus), min=dt_limit[0], max=dt_limit[1])
    decay = (_float(A) * steps).transpose(1, 2)
    initial = None if initial_states is None else initial_states.transpose(2, 3)
    q, k, v, w = (x.transpose(1, 2) for x in (C, B, hidden_states, steps))
    rule = f"decay='token'; gate='write'; chunk={chunk_size}; out='state'"
    out, state = RECURRENCE(q, k, v, decay, None, w, None, initial, rule)
    out = out.transpose(1, 2)
    if D is not None:
        out = out + D[..., None] * _float(hidden_states)
    return (out, state.transpose(2, 3)) if return_final_states else out


def chunk_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One token of Mamba-2: hidden_states, dt (B, H, P), A (H, P, N), equal over P and N; state (B, H, P, N) is
    overwritten."""
    bias = None if dt_bias is None else dt_bias[:, 0]
    steps = steps_of(dt[..., 0], bias, dt_softplus)[..., None]
    decay = _float(A[:, 0, :1]) * steps
    q, k, v = (x[:, :, None] for x in (C, B, hidden_states))
    initial = state.transpose(2, 3)
    out, last = RECURRENCE(q, k, v, decay, None, steps, None, initial, "decay='token'; gate='write'; out='state'")
    state.copy_(last.transpose(2, 3))
    out = out.squeeze(2).to(C.dtype)
    if D is not None:
        out = (out + hidden_states * D).to(out.dtype)
    if z is not None:
        out = out * F.silu(z)
    return out.to(hidden_states.dtype)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.float()
