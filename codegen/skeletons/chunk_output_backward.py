"""Gradients of chunked recurrences, all chunks at once, when the states S and their gradients dS are known.

Rows read: q with do, the gradient of the output; a with y (SOLVE; a = -beta k under the delta rule). Columns write: w k
with v (under the delta rule k with v', the corrected value); b with x (RANK). Then for each row r and column c

    dA = (gradient of r) . (value of c) exp(G_i - G_j)
    dr = dA c + exp(G) (gradient of r) S^T,   dc = dA^T r + exp(G_last - G) (value of c) dS^T
    dG = sum(r dr) - sum(c dc), and at the last token + exp(G_last) S . dS + sum(c dc that leaves); dg: sums from behind
    dv = A_qk^T do + A_ak^T y + exp(G_last - G) w k dS                           (beta y under the delta rule)

Shapes: query, key, a, b (B, heads, L, K), value, do (B, H, L, V), each with any strides; x, y, v' (B, H, L, V), states
and their gradients at chunk ends (B, H, N, K, V), A (B, H, L, BLOCK_C) contiguous; gradients by head contiguous: of q,
k, a, b (B, H, L, K), of the decay (B, H, L) or (B, H, L, K), of beta (B, H, L), of the bonus (B, H, N, K).

By channel, pairs are taken where they part, as in the forward. A token's pair with itself knows no decay and is kept
out of dG, so that what is left of strong decays is not lost in it.

Source: Yang et al. 2023, arXiv:2312.06635, section 4.3 and appendix (gradient of the decay); Yang et al. 2024,
arXiv:2412.06464, section 3.3.
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
DELTA = tl.constexpr(1)
RANK = tl.constexpr(2)


@triton.jit
def widened(p, row, stride, column, column_stride, m_row, norm, WIDTH: tl.constexpr, MID: tl.constexpr):
    """Columns of normed rows, as products see them, in float32."""
    x = tile(p, row, stride, column, column_stride, m_row, WIDTH).to(tl.float32)
    return (x * norm[:, None]).to(MID).to(tl.float32)


@triton.jit
def edges(p_segments, g, row, m_row, at, last, first, PACKED: tl.constexpr):
    """Where pairs (i, j) of different tokens lie in one document; what is left of the state at a token, but for exp(G),
    of a token at the chunk's end, and of the state there. By channel g is 0. p_segments + at: the chunk's first token,
    + first: the sequence's."""
    m_ok = (row[:, None] > row[None, :]) & m_row[:, None]
    g_last = tl.sum(tl.where(row == last, g, 0.0), 0)
    enter, total = tl.where(m_row, 1.0, 0.0), tl.exp(g_last)
    leave = enter * tl.exp(tl.where(m_row, g_last - g, 0.0))
    if PACKED:
        segment = tl.load(p_segments + at + row, mask=m_row, other=-1)
        before, end = segment_before(p_segments + first, at - first), tl.load(p_segments + at + last)
        m_ok = m_ok & (segment[:, None] == segment[None, :])
        enter = tl.where(segment == before, enter, 0.0)
        leave = tl.where(segment == end, leave, 0.0)
        total = tl.where(end == before, total, 0.0)
    return m_ok, enter, leave, total


@triton.jit
def add_pairs(d_row, d_column, d_pairs, x, y, fade_x, fade_y, MID: tl.constexpr, PRECISION: tl.constexpr):
    """Add what pairs (i, j) with gradients d_pairs hand back to rows x fade_x and columns y fade_y."""
    d_row += fade_x * tl.dot(d_pairs, (y * fade_y).to(MID), input_precision=PRECISION)
    d_column += fade_y * tl.dot(tl.trans(d_pairs), (x * fade_x).to(MID), input_precision=PRECISION)
    return d_row, d_column


@triton.jit
def of_values(p_do, p_v, p_x, p_y, row, o_l, o_e, v_l, v_e, m_row, V: tl.constexpr, SOLVE: tl.constexpr,
              MID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """do v^T, do x^T, y v^T, y x^T."""
    BLOCK_C: tl.constexpr = row.shape[0]
    d_qk = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    d_qb, d_ak, d_ab = d_qk, d_qk, d_qk
    for low in tl.range(0, V, BLOCK_V):
        value = low + tl.arange(0, BLOCK_V)
        do = tile(p_do, row, o_l, value, o_e, m_row, V).to(MID)
        v = tl.trans(tile(p_v, row, v_l, value, v_e, m_row, V).to(MID))
        d_qk = tl.dot(do, v, d_qk, input_precision=PRECISION)
        if SOLVE != 0:
            y = tile(p_y, row, V, value, 1, m_row, V).to(MID)
            d_ak = tl.dot(y, v, d_ak, input_precision=PRECISION)
        if SOLVE == RANK:
            x = tl.trans(tile(p_x, row, V, value, 1, m_row, V).to(MID))
            d_qb = tl.dot(do, x, d_qb, input_precision=PRECISION)
            d_ab = tl.dot(y, x, d_ab, input_precision=PRECISION)
    return d_qk, d_qb, d_ak, d_ab


@triton.jit
def of_states(p_states, p_dstates, p_do, p_v, p_x, p_y, row, column, o_l, o_e, v_l, v_e, m_row, K: tl.constexpr,
              V: tl.constexpr, SOLVE: tl.constexpr, DECAY: tl.constexpr, MID: tl.constexpr, PRECISION: tl.constexpr,
              BLOCK_V: tl.constexpr):  # fmt: skip
    """do S^T, v dS^T, y S^T, x dS^T, and the sums of S dS over columns of values."""
    dq = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    dk, da, db = dq, dq, dq
    held = tl.zeros([column.shape[0]], tl.float32)
    for low in tl.range(0, V, BLOCK_V):
        value = low + tl.arange(0, BLOCK_V)
        S = tile(p_states, column, V, value, 1, column < K, V)
        dS = tile(p_dstates, column, V, value, 1, column < K, V)
        if DECAY != 0:
            held += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        do = tile(p_do, row, o_l, value, o_e, m_row, V).to(MID)
        v = tile(p_v, row, v_l, value, v_e, m_row, V).to(MID)
        dq = tl.dot(do, tl.trans(S), dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(dS), dk, input_precision=PRECISION)
        if SOLVE != 0:
            y = tile(p_y, row, V, value, 1, m_row, V)
            da = tl.dot(y, tl.trans(S), da, input_precision=PRECISION)
        if SOLVE == RANK:
            x = tile(p_x, row, V, value, 1, m_row, V)
            db = tl.dot(x, tl.trans(dS), db, input_precision=PRECISION)
    return dq, dk, da, db, held


@triton.jit
def of_pairs(dq, dk, da, db, d_qk, d_qb, d_ak, d_ab, q, k, a, low_b, p_sums, row, column, rows, g, g_before,
             DECAY: tl.constexpr, SOLVE: tl.constexpr, BEFORE: tl.constexpr, K: tl.constexpr, MID: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of rows and columns with those of the pairs of different tokens added.

    By channel, pairs part where i ^ j has its highest bit: i in the later half of a block, j in the earlier."""
    LEVELS: tl.constexpr = 4 if row.shape[0] == 16 else 5 if row.shape[0] == 32 else 6 if row.shape[0] == 64 else 7
    if DECAY != CHANNEL:
        dq, dk = add_pairs(dq, dk, d_qk, q, k, 1.0, 1.0, MID, PRECISION)
        if SOLVE != 0:
            da, dk = add_pairs(da, dk, d_ak, a, k, 1.0, 1.0, MID, PRECISION)
        if SOLVE == RANK:
            dq, db = add_pairs(dq, db, d_qb, q, low_b, 1.0, 1.0, MID, PRECISION)
            da, db = add_pairs(da, db, d_ab, a, low_b, 1.0, 1.0, MID, PRECISION)
    else:
        apart = row[:, None] ^ row[None, :]
        for level in tl.range(0, LEVELS):
            pair = apart >> level == 1
            middle = (row >> (level + 1) << (level + 1)) + (1 << level) - 1
            g_middle = tile(p_sums, middle, K, column, 1, middle < rows, K)
            fade = tl.exp(-tl.abs(g - g_middle))
            fade_late = fade
            if BEFORE or SOLVE == RANK:
                fade_late = tl.exp(tl.minimum(g_before - g_middle, 0.0))
            fade_q = fade_late if BEFORE else fade
            fade_a = fade_late if SOLVE == RANK else fade
            dq, dk = add_pairs(dq, dk, tl.where(pair, d_qk, 0.0).to(MID), q, k, fade_q, fade, MID, PRECISION)
            if SOLVE != 0:
                da, dk = add_pairs(da, dk, tl.where(pair, d_ak, 0.0).to(MID), a, k, fade_a, fade, MID, PRECISION)
            if SOLVE == RANK:
                dq, db = add_pairs(dq, db, tl.where(pair, d_qb, 0.0).to(MID), q, low_b, fade_q, fade, MID, PRECISION)
                da, db = add_pairs(da, db, tl.where(pair, d_ab, 0.0).to(MID), a, low_b, fade_a, fade, MID, PRECISION)
    return dq, dk, da, db


@triton.jit
def chunk_output_backward(
    p_q, p_k, p_v, p_a, p_b, p_beta, p_bonus, p_sums, p_rate, p_norms, p_segments, p_do, p_x, p_y, p_states, p_dstates,
    p_dq, p_dk, p_da, p_db, p_dg, p_dbeta, p_dbonus,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, a_b, a_h, a_l, a_e, b_b, b_h, b_l, b_e,
    beta_b, beta_h, beta_l, bonus_h, bonus_e, o_b, o_h, o_l, o_e, H, B, L,
    GROUP: tl.constexpr, GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    DECAY: tl.constexpr, SOLVE: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr, PACKED: tl.constexpr,
    BEFORE: tl.constexpr, BONUS: tl.constexpr, SCALE: tl.constexpr, MID: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one head but for dv. Under the delta rule p_v is v'."""
    count = tl.cdiv(L, BLOCK_C)
    n, b, h = place(tl.program_id(0), count, H, GROUP)
    head, start = b * H + h, (n * BLOCK_C).to(tl.int64)
    row = tl.arange(0, BLOCK_C)
    m_row = row < L - start
    last = tl.minimum(BLOCK_C, L - start).to(tl.int32) - 1
    token = head * L + start
    rate = rate_of(p_rate, h, DECAY)
    p_states += (head * count + n) * K * V
    p_dstates += (head * count + n) * K * V
    p_q += b * q_b + h // GROUP * q_h + start * q_l
    p_k += b * k_b + h // GROUP * k_h + start * k_l
    p_v += b * v_b + h * v_h + start * v_l
    p_do += b * o_b + h * o_h + start * o_l
    if SOLVE != 0:
        p_y += token * V
    if SOLVE == RANK:
        p_x += token * V
        p_a += b * a_b + h // GROUP_A * a_h + start * a_l
        p_b += b * b_b + h // GROUP_B * b_h + start * b_l
    if DECAY >= TOKEN:
        p_sums += token * (K if DECAY == CHANNEL else 1)
    d_qk, d_qb, d_ak, d_ab = of_values(p_do, p_v, p_x, p_y, row, o_l, o_e, v_l, v_e, m_row, V, SOLVE, MID, PRECISION,
                                       BLOCK_V)  # fmt: skip
    same = row[:, None] == row[None, :]
    own, own_b = tl.sum(tl.where(same, d_qk, 0.0), 1) * SCALE, tl.sum(tl.where(same, d_qb, 0.0), 1) * SCALE
    g = decay_sums(p_sums, rate, row, m_row, DECAY)
    late = earlier_sums(p_sums, rate, row, m_row, DECAY)
    late_q, late_a = late if BEFORE else g, late if SOLVE == RANK else g
    m_ok, enter, leave, total = edges(p_segments, g, row, m_row, b * L + start, last, b * L, PACKED)
    e_q, e_a = pair_decay(late_q, g, m_ok, DECAY), pair_decay(late_a, g, m_ok, DECAY)
    d_qk = tl.where(m_ok, d_qk * e_q * SCALE, 0.0).to(MID)
    d_qb = tl.where(m_ok, d_qb * e_q * SCALE, 0.0).to(MID)
    d_ak, d_ab = tl.where(m_ok, d_ak * e_a, 0.0).to(MID), tl.where(m_ok, d_ab * e_a, 0.0).to(MID)

    ones = tl.full([BLOCK_C], 1.0, tl.float32)
    q_norm, k_norm, beta = ones, ones, ones
    if NORMED:
        k_head = b * (H // GROUP) + h // GROUP
        k_norm = vector(p_norms + k_head * L + start, row, 1, m_row)
        q_norm = vector(p_norms + (k_head + B * (H // GROUP)) * L + start, row, 1, m_row)
    if GATED:
        beta = vector(p_beta + b * beta_b + h * beta_h + start * beta_l, row, beta_l, m_row)
    of_g, of_rest, of_beta = ones * 0.0, ones * 0.0, ones * 0.0
    for low in tl.range(0, K, BLOCK_K):
        column = low + tl.arange(0, BLOCK_K)
        q = widened(p_q, row, q_l, column, q_e, m_row, q_norm, K, MID)
        k_plain = widened(p_k, row, k_l, column, k_e, m_row, k_norm, K, MID)
        k = (k_plain * beta[:, None]).to(MID).to(tl.float32) if GATED and SOLVE != DELTA else k_plain
        a, low_b = -k * beta[:, None], k
        if SOLVE == RANK:
            a = widened(p_a, row, a_l, column, a_e, m_row, ones, K, MID)
            low_b = widened(p_b, row, b_l, column, b_e, m_row, ones, K, MID)
        dq, dk, da, db, held = of_states(p_states, p_dstates, p_do, p_v, p_x, p_y, row, column, o_l, o_e, v_l, v_e,
                                         m_row, K, V, SOLVE, DECAY, MID, PRECISION, BLOCK_V)  # fmt: skip
        dq *= (enter * tl.exp(late_q) * SCALE)[:, None]
        da *= (enter * tl.exp(late_a))[:, None]
        dk *= leave[:, None]
        db *= leave[:, None]
        g_channel, g_before = k, k
        if DECAY == CHANNEL:
            g_channel = tile(p_sums, row, K, column, 1, m_row, K)
            g_before = tile(p_sums - K, row, K, column, 1, m_row & (row > 0), K)
            g_end = tl.load(p_sums + last * K + column, mask=column < K, other=0.0)
            fade = tl.exp(tl.where(m_row[:, None], g_end[None, :] - g_channel, 0.0))
            dq *= tl.exp(g_before if BEFORE else g_channel)
            da *= tl.exp(g_before if SOLVE == RANK else g_channel)
            dk *= fade
            db *= fade
            held *= tl.exp(g_end)
        left = held * total + tl.sum(k * dk, 0)
        if SOLVE == RANK:
            left += tl.sum(low_b * db, 0)
        dq, dk, da, db = of_pairs(dq, dk, da, db, d_qk, d_qb, d_ak, d_ab, q, k, a, low_b, p_sums, row, column, last + 1,
                                  g_channel, g_before, DECAY, SOLVE, BEFORE, K, MID, PRECISION)  # fmt: skip
        if DECAY != 0:
            reads, reads_a = q * dq, a * da if SOLVE != 0 else dq * 0.0
            dG = reads + reads_a - k * dk - (low_b * db if SOLVE == RANK else 0.0)
            early = (reads if BEFORE else dq * 0.0) + (reads_a if SOLVE == RANK else 0.0)
            if DECAY == CHANNEL:
                dg = tl.cumsum(dG, 0, reverse=True) - early + left[None, :]
                put(p_dg + token * K, dg, row, K, column, 1, m_row, K)
            of_g += tl.sum(dG, 1)
            of_rest += tl.sum(left[None, :] - early, 1)
        if BONUS:
            u = vector(p_bonus + h * bonus_h, column, bonus_e, column < K)
            tl.store(p_dbonus + (head * count + n) * K + column, tl.sum(own[:, None] * q * k, 0), mask=column < K)
        if BONUS or not BEFORE:
            weight = own[:, None] * u[None, :] if BONUS else own[:, None]
            dq += weight * k
            dk += weight * q
        if SOLVE == RANK and not BEFORE:
            dq += own_b[:, None] * low_b
            db += own_b[:, None] * q
        of_beta += tl.sum(k_plain * (-da if SOLVE == DELTA else dk), 1)
        if SOLVE == DELTA:
            dk -= beta[:, None] * da
        elif GATED:
            dk *= beta[:, None]
        put(p_dq + token * K, dq, row, K, column, 1, m_row, K)
        put(p_dk + token * K, dk, row, K, column, 1, m_row, K)
        if SOLVE == RANK:
            put(p_da + token * K, da, row, K, column, 1, m_row, K)
            put(p_db + token * K, db, row, K, column, 1, m_row, K)
    if DECAY != 0 and DECAY != CHANNEL:
        tl.store(p_dg + token + row, tl.cumsum(of_g, 0, reverse=True) + of_rest, mask=m_row)
    if GATED:
        tl.store(p_dbeta + token + row, of_beta, mask=m_row)


@triton.jit
def chunk_values_backward(
    p_q, p_k, p_beta, p_bonus, p_sums, p_rate, p_norms, p_segments, p_scores, p_keys, p_do, p_y, p_dstates, p_dv,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, beta_b, beta_h, beta_l, bonus_h, bonus_e, o_b, o_h, o_l, o_e, H, B, L,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, SOLVE: tl.constexpr,
    GATED: tl.constexpr, NORMED: tl.constexpr, PACKED: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr,
    STORED: tl.constexpr, SCALE: tl.constexpr, MID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dv of BLOCK_V columns of one chunk, but under the delta rule."""
    parts: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    at = tl.program_id(0)
    count = tl.cdiv(L, BLOCK_C)
    n, b, h = place(at // parts, count, H, GROUP)
    head, start = b * H + h, (n * BLOCK_C).to(tl.int64)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    i, j = row[:, None], row[None, :]
    value = at % parts * BLOCK_V + tl.arange(0, BLOCK_V)
    m_row = row < L - start
    last = tl.minimum(BLOCK_C, L - start).to(tl.int32) - 1
    token = head * L + start
    rate = rate_of(p_rate, h, DECAY)
    p_q += b * q_b + h // GROUP * q_h + start * q_l
    p_k += b * k_b + h // GROUP * k_h + start * k_l
    if DECAY >= TOKEN:
        p_sums += token * (K if DECAY == CHANNEL else 1)
    g = decay_sums(p_sums, rate, row, m_row, DECAY)
    late = earlier_sums(p_sums, rate, row, m_row, DECAY) if BEFORE else g
    m_ok, _enter, leave, _total = edges(p_segments, g, row, m_row, b * L + start, last, b * L, PACKED)
    if not BEFORE:
        m_ok = m_ok | ((i == j) & m_row[:, None])
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if NORMED:
        k_head = b * (H // GROUP) + h // GROUP
        weight *= vector(p_norms + k_head * L + start, row, 1, m_row)
    if GATED:
        weight *= vector(p_beta + b * beta_b + h * beta_h + start * beta_l, row, beta_l, m_row)
    leave *= weight

    acc = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    s = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    own = tl.zeros([BLOCK_C], tl.float32)
    for low in tl.range(0, K, BLOCK_K):
        column = low + channel
        k = tile(p_k, row, k_l, column, k_e, m_row, K)
        if not STORED:
            q = tile(p_q, row, q_l, column, q_e, m_row, K)
            s = tl.dot(q.to(MID), tl.trans(k.to(MID)), s, input_precision=PRECISION)
            if BONUS:
                u = vector(p_bonus + h * bonus_h, column, bonus_e, column < K)
                own += tl.sum(q.to(tl.float32) * k * u[None, :], 1)
        k = k.to(tl.float32) * leave[:, None]
        if DECAY == CHANNEL:
            end = tl.load(p_sums + last * K + column, mask=column < K, other=0.0)
            g_channel = tile(p_sums, row, K, column, 1, m_row, K)
            k *= tl.exp(tl.where(m_row[:, None], end[None, :] - g_channel, 0.0))
        dS = tile(p_dstates + (head * count + n) * K * V, column, V, value, 1, column < K, V)
        acc = tl.dot(k.to(MID), dS.to(MID), acc, input_precision=PRECISION)
    m_pair = m_row[:, None] & (row >= 0)[None, :]
    at_pair = (token + row)[:, None] * BLOCK_C + row[None, :]
    if STORED:
        s = tl.load(p_scores + at_pair, mask=m_pair, other=0.0).to(tl.float32)
    else:
        s = tl.where(m_ok, s * pair_decay(late, g, m_ok, DECAY), 0.0)
        if BONUS:
            s = tl.where(i == j, own[:, None], s)
        s *= weight[None, :] * SCALE
        if NORMED:
            s *= vector(p_norms + (k_head + B * (H // GROUP)) * L + start, row, 1, m_row)[:, None]
    do = tile(p_do + b * o_b + h * o_h + start * o_l, row, o_l, value, o_e, m_row, V)
    acc = tl.dot(tl.trans(s.to(MID)), do.to(MID), acc, input_precision=PRECISION)
    if SOLVE == RANK:
        y = tile(p_y + token * V, row, V, value, 1, m_row, V)
        s_a = tl.load(p_keys + at_pair, mask=m_pair, other=0.0).to(MID)
        acc = tl.dot(tl.trans(s_a), y.to(MID), acc, input_precision=PRECISION)
    put(p_dv + token * V, acc, row, V, value, 1, m_row, V)
