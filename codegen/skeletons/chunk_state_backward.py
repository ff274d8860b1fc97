"""Gradients of chunked recurrences: the gradient of the state from the last chunk to the first.

    y = y_local + X dS                                                        SOLVE DELTA, RANK
    dS <- exp(G_last) dS + (scale q exp(G))^T do + (a exp(G))^T y             a = -beta k under the delta rule

dS stands at a chunk's end before this step and at its start behind it. Rows that read the state before their token's
decay (BEFORE; a with RANK) take G of the token before.

Shapes: query, key, a (B, heads, L, K), do (B, H, L, V), each with any strides; X (B, H, L, K), y (B, H, L, V), which
holds y_local and then y, and the gradients of the states at the N chunks' ends (B, H, N, K, V) contiguous, of the type
of products; gradients of the final and of the initial state (B, H, K, V) contiguous float32.

Source: the transpose of Yang et al. 2024, arXiv:2412.06464, section 3.3.
"""

import triton
import triton.language as tl

from attnc.codegen.skeletons.chunk_parts import (
    CHANNEL,
    TOKEN,
    decay_sums,
    earlier_sums,
    put,
    rate_of,
    segment_before,
    tile,
    vector,
)

HOLES = ()
DELTA = tl.constexpr(1)
RANK = tl.constexpr(2)


@triton.jit
def reading(p_x, p_sums, row, x_l, x_e, m_row, column, enter, LATE: tl.constexpr, K: tl.constexpr,
            DECAY: tl.constexpr):  # fmt: skip
    """Columns of rows, times what of the state reaches them: exp(G) by channel, and `enter`."""
    x = tile(p_x, row, x_l, column, x_e, m_row, K).to(tl.float32)
    if DECAY == CHANNEL:
        m_g = m_row & (row > 0) if LATE else m_row
        x *= tl.exp(tile(p_sums - K if LATE else p_sums, row, K, column, 1, m_g, K))
    return x * enter[:, None]


@triton.jit
def chunk_state_backward(
    p_q, p_k, p_a, p_beta, p_do, p_sums, p_rate, p_norms, p_segments, p_weights, p_y, p_grad, p_dstates, p_dinitial,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, a_b, a_h, a_l, a_e, beta_b, beta_h, beta_l, o_b, o_h, o_l, o_e, H, B, L,
    GROUP: tl.constexpr, GROUP_A: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    SOLVE: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr, PACKED: tl.constexpr, BEFORE: tl.constexpr,
    SCALE: tl.constexpr, MID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_V columns of the states of one head, chunk before chunk."""
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    parts: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    at = tl.program_id(0)
    part, head = at % parts, (at // parts).to(tl.int64)
    b, h = head // H, head % H
    count = tl.cdiv(L, BLOCK_C)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    value = part * BLOCK_V + tl.arange(0, BLOCK_V)
    rate = rate_of(p_rate, h, DECAY)
    p_q += b * q_b + h // GROUP * q_h
    p_k += b * k_b + h // GROUP * k_h
    p_do += b * o_b + h * o_h
    if SOLVE == RANK:
        p_a += b * a_b + h // GROUP_A * a_h
    if SOLVE == DELTA and GATED:
        p_beta += b * beta_b + h * beta_h
    if PACKED:
        p_segments += b * L
    dS = ()  # type: tuple
    for t in tl.static_range(TILES):
        k_row = t * BLOCK_K + channel
        dS = dS + (tile(p_grad + head * K * V, k_row, V, value, 1, k_row < K, V).to(tl.float32),)

    for back in tl.range(0, count):
        n = count - 1 - back
        start = (n * BLOCK_C).to(tl.int64)
        m_row = row < L - start
        last = tl.minimum(BLOCK_C, L - start).to(tl.int32) - 1
        token = head * L + start
        for t in tl.static_range(TILES):
            k_row = t * BLOCK_K + channel
            put(p_dstates + (head * count + n) * K * V, dS[t], k_row, V, value, 1, k_row < K, V)

        # Weights of tokens on reading what came in; what is left of that at the end.
        total = 1.0
        p_sums_n = p_sums
        if DECAY == CHANNEL:
            p_sums_n += token * K
        if DECAY == TOKEN:
            p_sums_n += token
        enter = tl.where(m_row, 1.0, 0.0)
        enter_q = enter * SCALE
        enter_a = enter
        if DECAY != CHANNEL:
            g = decay_sums(p_sums_n, rate, row, m_row, DECAY)
            late = earlier_sums(p_sums_n, rate, row, m_row, DECAY)
            total = tl.exp(tl.load(p_sums_n + last) if DECAY == TOKEN else (last + 1) * rate)
            enter_q *= tl.exp(late if BEFORE else g)
            enter_a *= tl.exp(late if SOLVE == RANK else g)
        if PACKED:
            segment = tl.load(p_segments + start + row, mask=m_row, other=-1)
            before = segment_before(p_segments, start)
            enter_q = tl.where(segment == before, enter_q, 0.0)
            enter_a = tl.where(segment == before, enter_a, 0.0)
            total = tl.where(tl.load(p_segments + start + last) == before, total, 0.0)
        if NORMED:
            k_head = b * (H // GROUP) + h // GROUP
            enter_q *= vector(p_norms + (k_head + B * (H // GROUP)) * L + start, row, 1, m_row)
            if SOLVE == DELTA:
                enter_a *= vector(p_norms + k_head * L + start, row, 1, m_row)
        if SOLVE == DELTA:
            enter_a = -enter_a
            if GATED:
                enter_a *= vector(p_beta + start * beta_l, row, beta_l, m_row)

        do = tile(p_do + start * o_l, row, o_l, value, o_e, m_row, V).to(MID)
        if SOLVE != 0:
            y = tile(p_y + token * V, row, V, value, 1, m_row, V).to(tl.float32)
            for t in tl.static_range(TILES):
                weights = tile(p_weights + token * K, row, K, t * BLOCK_K + channel, 1, m_row, K)
                y = tl.dot(weights, dS[t].to(MID), y, input_precision=PRECISION)
            put(p_y + token * V, y, row, V, value, 1, m_row, V)
            y = y.to(MID)
        new = ()  # type: tuple
        for t in tl.static_range(TILES):
            column = t * BLOCK_K + channel
            old = dS[t] * total
            if DECAY == CHANNEL:
                old *= tl.exp(tl.load(p_sums_n + last * K + column, mask=column < K, other=0.0))[:, None]
            x = reading(p_q + start * q_l, p_sums_n, row, q_l, q_e, m_row, column, enter_q, BEFORE, K, DECAY)
            old = tl.dot(tl.trans(x.to(MID)), do, old, input_precision=PRECISION)
            if SOLVE == DELTA:
                x = reading(p_k + start * k_l, p_sums_n, row, k_l, k_e, m_row, column, enter_a, False, K, DECAY)
                old = tl.dot(tl.trans(x.to(MID)), y, old, input_precision=PRECISION)
            if SOLVE == RANK:
                x = reading(p_a + start * a_l, p_sums_n, row, a_l, a_e, m_row, column, enter_a, True, K, DECAY)
                old = tl.dot(tl.trans(x.to(MID)), y, old, input_precision=PRECISION)
            new = new + (old,)
        dS = new

    for t in tl.static_range(TILES):
        k_row = t * BLOCK_K + channel
        put(p_dinitial + head * K * V, dS[t], k_row, V, value, 1, k_row < K, V)
