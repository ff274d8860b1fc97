"""Gradients of chunked recurrences: what the corrected values hand back, but for the part of the state's gradient dS.

    y = T^T (A_qb^T do + b exp(G_last - G) dS) = y_local + X dS       the gradient of what T was applied to

The delta rule (SOLVE DELTA) is the case b = k, A_qb = A, a = -beta k. With y, its backward is the same as that of a
second query a whose output has the gradient y.

Shapes: query, key, b (B, heads, L, K), do (B, H, L, V), each with any strides; T, A and A_qb (B, H, L, BLOCK_C), X
(B, H, L, K), y_local (B, H, L, V) contiguous, of the type of products.

Source: the transpose of Yang et al. 2024, arXiv:2406.06484, section 3.
"""

import triton
import triton.language as tl

from attnc.codegen.skeletons.chunk_parts import (
    CHANNEL,
    TOKEN,
    decay_sums,
    pair_decay,
    place,
    put,
    rate_of,
    tile,
    vector,
)

HOLES = ()


@triton.jit
def chunk_within_backward(
    p_q, p_k, p_b, p_do, p_sums, p_rate, p_norms, p_segments, p_scores, p_reads, p_inverse, p_weights, p_y,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, b_b, b_h, b_l, b_e, o_b, o_h, o_l, o_e, H, B, L,
    GROUP: tl.constexpr, GROUP_B: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    NORMED: tl.constexpr, PACKED: tl.constexpr, STORED: tl.constexpr, RANK: tl.constexpr, SCALE: tl.constexpr,
    MID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """X and y_local of one chunk."""
    count = tl.cdiv(L, BLOCK_C)
    n, b, h = place(tl.program_id(0), count, H, GROUP)
    head, start = b * H + h, (n * BLOCK_C).to(tl.int64)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    m_row = row < L - start
    last = tl.minimum(BLOCK_C, L - start).to(tl.int32) - 1
    token = head * L + start
    rate = rate_of(p_rate, h, DECAY)
    p_q += b * q_b + h // GROUP * q_h + start * q_l
    p_k += b * k_b + h // GROUP * k_h + start * k_l
    if RANK:
        p_b += b * b_b + h // GROUP_B * b_h + start * b_l
    if DECAY == CHANNEL:
        p_sums += token * K
    if DECAY == TOKEN:
        p_sums += token
    g = decay_sums(p_sums, rate, row, m_row, DECAY)
    m_ok = (row[:, None] >= row[None, :]) & m_row[:, None]
    leave = tl.where(m_row, 1.0, 0.0)
    if PACKED:
        p_segments += b * L + start
        segment = tl.load(p_segments + row, mask=m_row, other=-1)
        m_ok = m_ok & (segment[:, None] == segment[None, :])
        leave = tl.where(segment == tl.load(p_segments + last), leave, 0.0)
    if NORMED:
        k_head = b * (H // GROUP) + h // GROUP
        k_norm = vector(p_norms + k_head * L + start, row, 1, m_row)
    m_pair = m_row[:, None] & (row >= 0)[None, :]
    at_pair = (token + row)[:, None] * BLOCK_C + row[None, :]
    if RANK:
        s = tl.load(p_reads + at_pair, mask=m_pair, other=0.0).to(tl.float32)
    elif STORED:
        s = tl.load(p_scores + at_pair, mask=m_pair, other=0.0).to(tl.float32)
    else:
        s = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for low in tl.range(0, K, BLOCK_K):
            q = tile(p_q, row, q_l, low + channel, q_e, m_row, K)
            k = tile(p_k, row, k_l, low + channel, k_e, m_row, K)
            s = tl.dot(q.to(MID), tl.trans(k.to(MID)), s, input_precision=PRECISION)
        s = tl.where(m_ok, s * pair_decay(g, g, m_ok, DECAY), 0.0) * SCALE
        if NORMED:
            s *= vector(p_norms + (k_head + B * (H // GROUP)) * L + start, row, 1, m_row)[:, None] * k_norm[None, :]
    inverse = tl.trans(tl.load(p_inverse + at_pair, mask=m_pair, other=0.0).to(MID))
    pairs = tl.dot(inverse, tl.trans(s.to(MID)), input_precision=PRECISION).to(MID)
    for low in tl.range(0, V, BLOCK_V):
        value = low + tl.arange(0, BLOCK_V)
        do = tile(p_do + b * o_b + h * o_h + start * o_l, row, o_l, value, o_e, m_row, V)
        put(p_y + token * V, tl.dot(pairs, do.to(MID), input_precision=PRECISION), row, V, value, 1, m_row, V)
    if DECAY != CHANNEL:
        g_last = tl.sum(tl.where(row == last, g, 0.0), 0)
        leave *= tl.exp(tl.where(m_row, g_last - g, 0.0))
    if NORMED and not RANK:
        leave *= k_norm
    for low in tl.range(0, K, BLOCK_K):
        column = low + channel
        if RANK:
            x = tile(p_b, row, b_l, column, b_e, m_row, K).to(tl.float32)
        else:
            x = tile(p_k, row, k_l, column, k_e, m_row, K).to(tl.float32)
        if DECAY == CHANNEL:
            g_channel = tile(p_sums, row, K, column, 1, m_row, K)
            end = tl.load(p_sums + last * K + column, mask=column < K, other=0.0)
            x *= tl.exp(tl.where(m_row[:, None], end[None, :] - g_channel, 0.0))
        x *= leave[:, None]
        put(p_weights + token * K, tl.dot(inverse, x.to(MID), input_precision=PRECISION), row, K, column, 1, m_row, K)
