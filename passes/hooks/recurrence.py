"""What attnc's compiles trace in place of a library's loops over tokens or chunks: the recurrence operator.

Each function takes what the library's takes and gives what it gives. They are traced by Dynamo, so they keep to
tensors and plain values. `passes.hooks.table` names the functions that they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.op_recurrence import RECURRENCE

NORM_EPS = 1e-6  # of the norm that delta rules apply to queries and keys


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule in chunks: query, key (B, L, Hk, K), value (B, L, H, V), g, beta (B, L, H)."""
    return _delta(
        "token", query, key, value, g, beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel
    )


def gated_delta_rule_by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule token by token; shapes as in chunks."""
    return _delta("token", query, key, value, g, beta, 1, initial_state, output_final_state, use_qk_l2norm_in_kernel)


def kimi_delta_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Delta rule with decay by channel, g (B, L, H, K), in chunks."""
    return _delta(
        "channel", query, key, value, g, beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel
    )


def kimi_delta_attention_by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Delta rule with decay by channel, token by token."""
    return _delta("channel", query, key, value, g, beta, 1, initial_state, output_final_state, use_qk_l2norm_in_kernel)


def _delta(
    decay: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk: int,
    initial: Tensor | None,
    wants_state: bool,
    normed: bool,
) -> tuple[Tensor, Tensor | None]:
    norm = NORM_EPS if normed else None
    scale = query.shape[-1] ** -0.5
    rule = f"decay='{decay}'; delta=True; gate='write'; scale={scale}; qk_norm={norm}; chunk={chunk}"
    q, k, v, g, beta = (x.transpose(1, 2) for x in (query, key, value, g, beta))
    out, state = RECURRENCE(q, k, v, g, None, beta, None, initial, rule)
    return out.transpose(1, 2), state if wants_state else None


def rg_lru_scan(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """RG-LRU: hidden_states and gate (B, L, C), reset (B, L, 1) to the outputs and the last state (B, C)."""
    factors = (recurrent_gate * ~reset).transpose(1, 2)
    initial = None if recurrent_states is None else recurrent_states[..., None, None]
    value = hidden_states.transpose(1, 2)[..., None]
    rule = "decay='token'; factors=True"
    if acc_dtype == torch.float64 or (recurrent_states is not None and recurrent_states.dtype == torch.float64):
        rule = "decay='token'; factors=True; state='float64'"
    out, state = RECURRENCE(None, None, value, factors, None, None, None, initial, rule)
    return out.squeeze(-1).transpose(1, 2), state[..., 0, 0]


def rwkv_linear_attention(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Tensor, Any]:
    """RWKV-4: time_decay and time_first (C,), key and value (B, L, C); the state is three tensors (B, C)."""
    rule = "decay='head'; gate='exp'; read='before'; normaliser='sum'"
    if value.dtype == torch.float64:
        rule = "decay='head'; gate='exp'; read='before'; normaliser='sum'; state='float64'"
    initial = None if state is None else torch.stack(tuple(state), -1)[:, :, None]
    k, v = key.transpose(1, 2), value.transpose(1, 2)[..., None]
    out, last = RECURRENCE(None, None, v, -torch.exp(time_decay), None, k, time_first, initial, rule)
    if return_state or state is not None:
        state = list(last.squeeze(2).unbind(-1))
    return out.squeeze(-1).transpose(1, 2), state


def lightning_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Lightning attention with its projections: hidden_states (B, L, C), attention_mask (B, L) or None; also gives the
    last state (B, H, D, D), which the cache keeps."""
    B, L, _ = hidden_states.shape
    H, D = self.num_attention_heads, self.head_dim
    mixed = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    q, k, v = mixed.view(B, L, H, 3 * D).transpose(1, 2).split(D, 3)
    initial = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
    chunk = self.block_size if initial is None else 1
    decay = -self.slope_rate.flatten()
    out, state = RECURRENCE(q, k, v, decay, None, None, None, initial, f"decay='head'; chunk={chunk}")
    state = state.to(v.dtype)
    mixed = self.norm(out.transpose(1, 2).reshape(B, L, H * D))
    if past_key_values is not None:
        past_key_values.set_linear_cache(self.layer_idx, state)
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * mixed), state


# mLSTM: query, key (B, H, L, K), value (B, H, L, V), gates (B, H, L); states (B, H, K, V), (B, H, K), (B, H, 1).


def mlstm_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    **kwargs: Any,
) -> Any:
    """mLSTM over a whole number of chunks."""
    out, last = _mlstm(query, key, value, igate, fgate, (c_initial, n_initial, m_initial), eps, chunk_size)
    return (out, _states(last, value, key.dtype)) if return_last_states else out


def mlstm_by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Any:
    """mLSTM token by token."""
    out, last = _mlstm(query, key, value, igate, fgate, (c_initial, n_initial, m_initial), eps, 1)
    return (out, _states(last, value, dtype_state)) if return_last_states else out


def mlstm_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    cstate: Tensor,
    nstate: Tensor,
    mstate: Tensor,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Any:
    """One token of mLSTM: query, key (B, H, K), value (B, H, V), gates (B, H, 1)."""
    q, k, v = (x[:, :, None] for x in (query, key, value))
    out, last = _mlstm(q, k, v, igate, fgate, (cstate, nstate, mstate), eps, 1)
    return out.squeeze(2), _states(last, value, dtype_state)


def mlstm_padded(
    mlstm_chunkwise_kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fgate: Tensor,
    igate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.bfloat16,
    chunk_size: int = 64,
    **kwargs: Any,
) -> Any:
    """mLSTM of any length, without the states: padding would change them."""
    return _mlstm(query, key, value, igate, fgate, (c_initial, n_initial, m_initial), eps, chunk_size)[0]


def mlstm_of_any_length(
    mlstm_chunkwise_kernel: Any,
    mlstm_sequence_kernel: Any,
    mlstm_step_kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fgate: Tensor,
    igate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = True,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.bfloat16,
    chunk_size: int = 64,
    enable_logging: bool = False,
) -> Any:
    """mLSTM of any length, in chunks as far as they go."""
    out, last = _mlstm(query, key, value, igate, fgate, (c_initial, n_initial, m_initial), eps, chunk_size)
    if not return_last_states:
        return out
    kept = getattr(mlstm_sequence_kernel, "keywords", {}).get("dtype_state", torch.float32)
    if key.dtype != kept and query.shape[2] % chunk_size == 0:  # no step follows the last chunk
        kept = key.dtype
    return out, _states(last, value, kept)


def _mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    states: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The outputs, and the last states as the operator packs them."""
    cell, norm, maximum = states
    packed = None
    if cell is not None and norm is not None and maximum is not None:
        packed = torch.cat([cell, norm[..., None], maximum[..., None].expand(-1, -1, cell.shape[2], -1)], -1)
    acc = "float64" if query.dtype == torch.float64 else "float32"
    scale = query.shape[-1] ** -0.5
    rule = f"decay='token'; gate='exp'; normaliser='max1'; eps={eps}; scale={scale}; chunk={chunk}; state='{acc}'"
    # On the CPU the result is contiguous whatever its meta kernel says, and views in the backward would fail.
    forget = F.logsigmoid(fgate.contiguous())
    return RECURRENCE(query, key, value, forget, None, igate, None, packed, rule)


def _states(packed: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    width = value.shape[-1]
    packed = packed.to(dtype)
    return packed[..., :width], packed[..., width], packed[:, :, 0, width + 1 :]
