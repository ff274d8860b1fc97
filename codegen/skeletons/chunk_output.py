"""Recurrences in chunks: what queries read, from the state at their chunk's start and from the tokens before them.

    o = scale q exp(G) S + A v + A_qb x,    A[i, j] = scale q_i . k_j exp(G_i - G_j) w_j

Shapes: query, key (B, heads, L, K), value and out (B, H, L, V), each with any strides; states (B, H, N, K, V), x
(B, H, L, V), A and A_qb (B, H, L, BLOCK_C) contiguous, of the type of products. BEFORE: queries read before their own
token, with BONUS for it. NORMALISED: o is divided by what it would be for v = 1, or (MAX1) at least exp(-maximum).

Why it is fast: without a decay by channel A never leaves the registers, and query and key are loaded once for the
state's part and for A; the factor exp(G_i) is applied once to a row of the result; all chunks run at once; programs of
one chunk and group of heads run side by side, so that query and key come from the cache for all but one of them.

Source: Yang et al. 2023, arXiv:2312.06635, section 4; Dao and Gu 2024, arXiv:2405.21060, section 6.
"""

import triton
import triton.language as tl

from attnc.codegen.skeletons.chunk_parts import (
    CHANNEL,
    TOKEN,
    decay_sums,
    earlier_sums,
    pair_decay,
    place,
    put,
    rate_of,
    segment_before,
    tile,
    vector,
)

HOLES = ()


@triton.jit
def chunk_output(
    p_q, p_k, p_v, p_beta, p_bonus, p_sums, p_rate, p_norms, p_segments, p_scores, p_reads, p_states, p_corrected,
    p_normalisers, p_maximum, p_out,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, beta_b, beta_h, beta_l, bonus_h, bonus_e,
    o_b, o_h, o_l, o_e, H, B, L,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, GATED: tl.constexpr,
    NORMED: tl.constexpr, PACKED: tl.constexpr, NORMALISED: tl.constexpr, MAX1: tl.constexpr, BEFORE: tl.constexpr,
    BONUS: tl.constexpr, STORED: tl.constexpr, RANK: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    MID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_V columns of the output of one chunk."""
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    parts: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    at = tl.program_id(0)
    count = tl.cdiv(L, BLOCK_C)
    n, b, h = place(at // parts, count, H, GROUP)
    head, start = b * H + h, (n * BLOCK_C).to(tl.int64)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    value = at % parts * BLOCK_V + tl.arange(0, BLOCK_V)
    m_row = row < L - start
    m_ok = (row[:, None] > row[None, :] if BEFORE else row[:, None] >= row[None, :]) & m_row[:, None]
    token = head * L + start
    rate = rate_of(p_rate, h, DECAY)
    p_q += b * q_b + h // GROUP * q_h + start * q_l
    p_k += b * k_b + h // GROUP * k_h + start * k_l
    if DECAY == CHANNEL:
        p_sums += token * K
    if DECAY == TOKEN:
        p_sums += token
    p_states += (head * count + n) * K * V
    acc = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    s = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    own = tl.zeros([BLOCK_C], tl.float32)
    norm = tl.zeros([BLOCK_C], tl.float32)
    for t in tl.static_range(TILES):
        column = t * BLOCK_K + channel
        q = tile(p_q, row, q_l, column, q_e, m_row, K)
        if not STORED:
            k = tile(p_k, row, k_l, column, k_e, m_row, K)
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
            if BONUS:
                u = vector(p_bonus + h * bonus_h, column, bonus_e, column < K)
                own += tl.sum(q.to(tl.float32) * k * u[None, :], 1)
        if DECAY == CHANNEL:
            m_g = m_row & (row > 0) if BEFORE else m_row
            q = q * tl.exp(tile(p_sums - K if BEFORE else p_sums, row, K, column, 1, m_g, K))
        state = tile(p_states, column, V, value, 1, column < K, V)
        acc = tl.dot(q.to(MID), state, acc, input_precision=PRECISION)
        if NORMALISED:
            n_t = tl.load(p_normalisers + (head * count + n) * K + column, mask=column < K, other=0.0)
            norm += tl.sum(q * n_t[None, :], 1)

    g = decay_sums(p_sums, rate, row, m_row, DECAY)
    late = earlier_sums(p_sums, rate, row, m_row, DECAY) if BEFORE else g
    enter = tl.exp(late) * SCALE
    if PACKED:
        p_segments += b * L
        segment = tl.load(p_segments + start + row, mask=m_row, other=-1)
        m_ok = m_ok & (segment[:, None] == segment[None, :])
        enter = tl.where(segment == segment_before(p_segments, start), enter, 0.0)
    if NORMED:
        k_head = b * (H // GROUP) + h // GROUP
        q_norm = vector(p_norms + (k_head + B * (H // GROUP)) * L + start, row, 1, m_row)
        enter *= q_norm
    acc *= enter[:, None]
    if STORED:
        s = tile(p_scores + token * BLOCK_C, row, BLOCK_C, row, 1, m_row, BLOCK_C)
    else:
        s = tl.where(m_ok, s * pair_decay(late, g, m_ok, DECAY), 0.0) * SCALE
        if BONUS:
            s = tl.where(row[:, None] == row[None, :], (own * SCALE)[:, None], s)
        if NORMED:
            k_norm = vector(p_norms + k_head * L + start, row, 1, m_row)
            s *= q_norm[:, None] * k_norm[None, :]
        if GATED:
            s *= vector(p_beta + b * beta_b + h * beta_h + start * beta_l, row, beta_l, m_row)[None, :]
    v = tile(p_v + b * v_b + h * v_h + start * v_l, row, v_l, value, v_e, m_row, V)
    acc = tl.dot(s.to(MID), v.to(MID), acc, input_precision=PRECISION)
    if RANK:
        s_x = tile(p_reads + token * BLOCK_C, row, BLOCK_C, row, 1, m_row, BLOCK_C)
        x = tile(p_corrected + token * V, row, V, value, 1, m_row, V)
        acc = tl.dot(s_x, x, acc, input_precision=PRECISION)
    if NORMALISED:
        norm = norm * enter + tl.sum(s.to(tl.float32), 1)
        if MAX1:
            norm = tl.maximum(tl.abs(norm), tl.exp(-vector(p_maximum + token, row, 1, m_row)))
        acc = acc / tl.where(m_row, norm + EPS, 1.0)[:, None]
    p_out += b * o_b + h * o_h + start * o_l
    put(p_out, acc, row, o_l, value, o_e, m_row, V)
