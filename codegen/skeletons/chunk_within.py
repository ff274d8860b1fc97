"""Recurrences in chunks: what tokens of one chunk are to each other, before any state is known.

    G = sums of the decay from the chunk's start;  1 / |q|, 1 / |k|
    A_qk[i, j] = scale q_i . k_j exp(G_i - G_j) w_j           j <= i      (read BEFORE: exp(G_{i-1} - G_j), j < i)
    SOLVE DELTA:  T = (I + A_kk)^-1,  A_kk[i, j] = beta_i k_i . k_j exp(G_i - G_j)                        j < i
    SOLVE RANK:   T = (I - A_ab)^-1,  A_ab[i, j] = a_i . b_j exp(G_{i-1} - G_j), A_ak likewise with w_j   j < i,
                  A_qb[i, j] = scale q_i . b_j exp(G_i - G_j)             j <= i      (BEFORE likewise)

Shapes: query, key, a, b (B, heads, L, K), decay (B, H, L) or (B, H, L, K), beta (B, H, L), with any strides; G as the
decay, norms (2, B, Hk, L) of keys, then queries, contiguous float32; T and the A (B, H, L, BLOCK_C) contiguous, of the
type of products. SCORES: whether A_qk is wanted; without a decay by channel the output kernel makes its own.

By channel, pairs are taken where they part: at SIZE 1, 2, .. C / 2, i in the later half of a block of 2 SIZE tokens, j
in the earlier. With R the sum at the end of the earlier half, exp(G_i - G_j) = exp(G_i - R) exp(R - G_j), no exponent
positive, and both factors are exp(-|G - R|): one exponential per token, channel and size (two where rows see less
decay), log2(C) of them where pairs within 16 tokens would take 16, and products of (C, K) by (K, C) on tensor cores.

Why it is fast: what a matrix needs stays in registers until it is written, two accumulators at most, because rows q
and rows k or a go to two programs; they run side by side, so that k, b and G, which both read, come from the cache for
one of them, and so do the rows of heads that share keys; T is solved in registers, its diagonal blocks of 16 all at
once; W and U are not made, `chunk_state` has one product more instead.

Source: Yang et al. 2024, arXiv:2406.06484, section 3 and appendix; Yang et al. 2023, arXiv:2312.06635, section 4.3.
"""

import triton
import triton.language as tl

from attnc.codegen.skeletons.chunk_parts import (
    CHANNEL,
    LEAST,
    TOKEN,
    decay_sums,
    earlier_sums,
    halves,
    inverse,
    pair_decay,
    place,
    put,
    rate_of,
    tile,
    vector,
)

HOLES = ()
DELTA = tl.constexpr(1)
RANK = tl.constexpr(2)


@triton.jit
def chunk_sums(p_decay, p_sums, g_b, g_h, g_l, g_e, H, L, K: tl.constexpr, BLOCK_C: tl.constexpr,
               BLOCK_K: tl.constexpr):  # fmt: skip
    """G of one chunk of one head, in K columns."""
    n, b, h = place(tl.program_id(0), tl.cdiv(L, BLOCK_C), H, 1)
    start = (n * BLOCK_C).to(tl.int64)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    p_decay += b * g_b + h * g_h + start * g_l
    p_sums += ((b * H + h) * L + start) * K
    m_row = row < L - start
    for low in tl.static_range(0, K, BLOCK_K):
        column = low + channel
        g = tl.maximum(tile(p_decay, row, g_l, column, g_e, m_row, K).to(tl.float32), LEAST)
        put(p_sums, tl.cumsum(g, 0), row, K, column, 1, m_row, K)


@triton.jit
def row_norms(p_q, p_k, p_norms, q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, B, H, L, K: tl.constexpr, EPS: tl.constexpr,
              BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """1 / sqrt(x . x + EPS) of BLOCK_C rows of keys and of queries."""
    n, b, h = place(tl.program_id(0), tl.cdiv(L, BLOCK_C), H, 1)
    start = (n * BLOCK_C).to(tl.int64)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    m_row = row < L - start
    p_k += b * k_b + h * k_h + start * k_l
    p_q += b * q_b + h * q_h + start * q_l
    of_k, of_q = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for low in tl.static_range(0, K, BLOCK_K):
        column = low + channel
        k = tile(p_k, row, k_l, column, k_e, m_row, K).to(tl.float32)
        q = tile(p_q, row, q_l, column, q_e, m_row, K).to(tl.float32)
        of_k += tl.sum(k * k, 1)
        of_q += tl.sum(q * q, 1)
    p_norms += (b * H + h) * L + start + row
    tl.store(p_norms, tl.rsqrt(of_k + EPS), mask=m_row)
    tl.store(p_norms + B.to(tl.int64) * H * L, tl.rsqrt(of_q + EPS), mask=m_row)


@triton.jit
def products(acc, x, y, m_pair, MID: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x . y at the pairs of m_pair."""
    s = tl.dot(x.to(MID), tl.trans(y.to(MID)), input_precision=PRECISION)
    return acc + tl.where(m_pair, s, 0.0)


@triton.jit
def store_pairs(p, s, row, m_row):
    """Write a (C, C) tile into the rows of its tokens."""
    put(p, s, row, row.shape[0], row, 1, m_row, row.shape[0])


@triton.jit
def write_scores(p_scores, p_reads, xk, xb, own, own_b, of_pair, beta, q_norm, k_norm, row, m_ok, m_row,
                 RANK_TOO: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """A_qk and A_qb of one chunk."""
    i, j = row[:, None], row[None, :]
    xk = tl.where(i == j, own[:, None], tl.where(m_ok, xk * of_pair, 0.0))
    store_pairs(p_scores, xk * (q_norm * SCALE)[:, None] * (k_norm * beta)[None, :], row, m_row)
    if RANK_TOO:
        xb = tl.where(i == j, own_b[:, None], tl.where(m_ok, xb * of_pair, 0.0))
        store_pairs(p_reads, xb * (q_norm * SCALE)[:, None], row, m_row)


@triton.jit
def write_solved(p_inverse, p_keys, xk, xb, of_pair, beta, k_norm, row, m_ok, m_row, SOLVE: tl.constexpr,
                 EXACT: tl.constexpr):  # fmt: skip
    """T of one chunk, and A_ak."""
    xk = tl.where(m_ok, xk * of_pair, 0.0)
    if SOLVE == RANK:
        store_pairs(p_keys, xk * (k_norm * beta)[None, :], row, m_row)
        a = tl.where(m_ok, xb * of_pair, 0.0) * -1.0
    else:
        a = xk * (k_norm * beta)[:, None] * k_norm[None, :]
    store_pairs(p_inverse, inverse(a, EXACT), row, m_row)


@triton.jit
def chunk_within(
    p_q, p_k, p_a, p_b, p_beta, p_bonus, p_sums, p_rate, p_norms, p_segments, p_scores, p_inverse, p_keys, p_reads,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, a_b, a_h, a_l, a_e, b_b, b_h, b_l, b_e, beta_b, beta_h, beta_l,
    bonus_h, bonus_e, H, B, L,
    GROUP: tl.constexpr, GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr,
    SOLVE: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr, PACKED: tl.constexpr, BEFORE: tl.constexpr,
    BONUS: tl.constexpr, SCORES: tl.constexpr, SCALE: tl.constexpr, MID: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The matrices of one chunk of one head, rows k or a by one program and rows q by another, where both are wanted;
    columns k and b. EXACT: precision of products that make T."""
    LEVELS: tl.constexpr = 4 + (BLOCK_C > 16) + (BLOCK_C > 32) + (BLOCK_C > 64)  # log2 of the chunk
    BOTH: tl.constexpr = SCORES and SOLVE != 0
    at = tl.program_id(0)
    solving = at % 2 == 0  # if BOTH
    n, b, h = place(at // 2 if BOTH else at, tl.cdiv(L, BLOCK_C), H, GROUP)
    head, start = b * H + h, (n * BLOCK_C).to(tl.int64)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    i, j = row[:, None], row[None, :]
    m_row = row < L - start
    token = head * L + start
    rate = rate_of(p_rate, h, DECAY)
    p_k += b * k_b + h // GROUP * k_h + start * k_l
    p_q += b * q_b + h // GROUP * q_h + start * q_l
    shift = 1 if BEFORE else 0  # tokens by which rows see less decay
    if SOLVE == RANK:
        p_a += b * a_b + h // GROUP_A * a_h + start * a_l
        p_b += b * b_b + h // GROUP_B * b_h + start * b_l
        shift = tl.where(solving, 1, shift)
    if DECAY == CHANNEL:
        p_sums += token * K
    if DECAY == TOKEN:
        p_sums += token
    xk = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    xb = xk
    own, own_b = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for low in tl.range(0, K, BLOCK_K):
        column = low + channel
        k = tile(p_k, row, k_l, column, k_e, m_row, K)
        if BOTH:
            if solving:
                x = k if SOLVE == DELTA else tile(p_a, row, a_l, column, a_e, m_row, K)
            else:
                x = tile(p_q, row, q_l, column, q_e, m_row, K)
        else:
            x = tile(p_q, row, q_l, column, q_e, m_row, K) if SCORES else k
        if BONUS:
            u = vector(p_bonus + h * bonus_h, column, bonus_e, column < K)
            own += tl.sum(x.to(tl.float32) * k * u[None, :], 1)
        elif SCORES and not BEFORE:
            own += tl.sum(x.to(tl.float32) * k, 1)
        if SOLVE == RANK:
            y = tile(p_b, row, b_l, column, b_e, m_row, K)
            if not BEFORE:
                own_b += tl.sum(x.to(tl.float32) * y, 1)
        if DECAY != CHANNEL:
            xk = tl.dot(x, tl.trans(k), xk, input_precision=PRECISION)
            if SOLVE == RANK:
                xb = tl.dot(x, tl.trans(y), xb, input_precision=PRECISION)
        else:
            g = tile(p_sums, row, K, column, 1, m_row, K)
            if BEFORE or SOLVE == RANK:
                g_x = tile(p_sums - shift * K, row, K, column, 1, m_row & (row >= shift), K)
            for level in tl.range(0, LEVELS):
                pair = halves(i, j, level)
                middle = (row >> (level + 1) << (level + 1)) + (1 << level) - 1
                g_middle = tile(p_sums, middle, K, column, 1, middle < L - start, K)
                fade = tl.exp(-tl.abs(g - g_middle))
                of_x = tl.exp(tl.minimum(g_x - g_middle, 0.0)) if BEFORE or SOLVE == RANK else fade
                x_fade = (x * of_x).to(MID)
                xk = products(xk, x_fade, k * fade, pair, MID, PRECISION)
                if SOLVE == RANK:
                    xb = products(xb, x_fade, y * fade, pair, MID, PRECISION)

    m_ok = (i > j) & m_row[:, None]
    if PACKED:
        segment = tl.load(p_segments + b * L + start + row, mask=m_row, other=-1)
        m_ok = m_ok & (segment[:, None] == segment[None, :])
    g_row = decay_sums(p_sums, rate, row, m_row, DECAY)
    late = g_row
    if BEFORE or SOLVE == RANK:
        late = tl.where(shift == 1, earlier_sums(p_sums, rate, row, m_row, DECAY), g_row)
    of_pair = pair_decay(late, g_row, m_ok, DECAY)
    ones = tl.full([BLOCK_C], 1.0, tl.float32)
    q_norm, k_norm, beta = ones, ones, ones
    if NORMED:
        k_head = b * (H // GROUP) + h // GROUP
        k_norm = vector(p_norms + k_head * L + start, row, 1, m_row)
        q_norm = vector(p_norms + (k_head + B * (H // GROUP)) * L + start, row, 1, m_row)
    if GATED:
        beta = vector(p_beta + b * beta_b + h * beta_h + start * beta_l, row, beta_l, m_row)
    write = ones if SOLVE == DELTA else beta
    if SCORES:
        p_scores += token * BLOCK_C
    if SOLVE != 0:
        p_inverse += token * BLOCK_C
    if SOLVE == RANK:
        p_keys += token * BLOCK_C
        p_reads += token * BLOCK_C
    if BOTH:
        if solving:
            write_solved(p_inverse, p_keys, xk, xb, of_pair, beta, k_norm, row, m_ok, m_row, SOLVE, EXACT)
        else:
            write_scores(p_scores, p_reads, xk, xb, own, own_b, of_pair, write, q_norm, k_norm, row, m_ok, m_row,
                         SOLVE == RANK, SCALE)  # fmt: skip
    elif SCORES:
        write_scores(p_scores, p_reads, xk, xb, own, own_b, of_pair, write, q_norm, k_norm, row, m_ok, m_row, False,
                     SCALE)  # fmt: skip
    else:
        write_solved(p_inverse, p_keys, xk, xb, of_pair, beta, k_norm, row, m_ok, m_row, SOLVE, EXACT)
