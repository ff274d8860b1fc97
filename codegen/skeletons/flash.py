"""Softmax attention in tiles: out and log-sum-exp, and its gradients in two kernels. Unfilled it is dense attention.

    o_i = sum_j p_ij v_j,   p_ij = exp(score_ij - lse_i),   lse_i = log(exp(sink_i) + sum_{j kept} exp(score_ij))
    dv_j = sum_i p_ij do_i,   d score_ij = p_ij (do_i . v_j - delta_i),   delta_i = do_i . o_i

Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, EV), out as query with EV columns, each with any strides;
lse and delta (B, Hq, L) contiguous float32. Query head h reads key head h // GROUP; dk and dv are summed over the group
by one program, without atomics. A row without keys gives out 0, lse -inf and no gradient.

Tiles: a program visits tiles that are masked, then tiles kept whole, which take no mask. Which ones, the holes `visit`
and `visit_rows` say as ranges, or (TABLE) lists per block: masked ones first, whole ones behind. Rows and columns
beyond L and S lie in masked tiles only. A width is a power of two plus a tail that is one: 192 = 128 + 64.

Holes: functions of scalars b, h (int64), a column of rows i and a row of columns j; in `flash_dkv` i is a row and j a
column, so their bodies only broadcast. m_ok holds where a pair exists. SCALE: the score is SCALE * s, or 0: `score`
says. Scores are natural logits; the kernels count in powers of two. DOT8: q and k of 8 bits are multiplied unwidened.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691, section 3; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import triton
import triton.language as tl

from attnc.codegen.skeletons.flash_parts import (
    LN2,
    LOG2E,
    gain,
    logits,
    product,
    put,
    settled,
    sink,
    slopes,
    soften,
    tile,
    weighted,
    weights,
)

HOLES = ("keep", "score", "score_slope", "add_grads", "sink", "gain", "visit", "visit_rows")


@triton.jit
def add_grads(d_score, s, b, h, i, j, m_ok, captured, captured_grads):
    """Add d loss / d captured tensors of a tile (i a column) into their buffers, d_score being d loss / d score."""
    return


@triton.jit
def visit(b, h, i_low, i_high, L, S, captured):
    """Keys that some row of i_low .. i_high - 1 may keep, first and end; those that every one of these rows keeps."""
    return 0, S, 0, S


@triton.jit
def visit_rows(b, h, j_low, j_high, L, S, captured):
    """Rows that may keep some key of j_low .. j_high - 1, first and end; those that keep every one of these keys."""
    return 0, L, 0, L


@triton.jit
def place(count, SECTION: tl.constexpr, XCDS: tl.constexpr):
    """Block and (batch, head) of this program: heads in sections of SECTION, whose data share the cache; all first
    blocks of a section, then all second ones. XCDS: dies with a cache each, which take programs in turn."""
    programs = tl.num_programs(0)
    at = tl.program_id(0)
    if XCDS > 1:
        each = tl.cdiv(programs, XCDS)
        die = at % XCDS
        at = die * each + at // XCDS - tl.maximum(die - (programs - (each - 1) * XCDS), 0)
    heads = programs // count
    section = at // (count * SECTION)
    rest = at - section * count * SECTION
    width = tl.minimum(SECTION, heads - section * SECTION)
    return rest // width, section * SECTION + rest % width


@triton.jit
def split(low, high, full_low, full_high, length, inside, BLOCK: tl.constexpr):
    """A range in blocks: its first position, masked blocks before the full ones, full ones, masked ones in all."""
    low = tl.maximum(low, 0) // BLOCK * BLOCK
    high = tl.minimum(tl.maximum(high, low), length)
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK)
    before = tl.cdiv(tl.maximum(full_low - low, 0), BLOCK)
    full = tl.maximum(tl.minimum(full_high, high) - low, 0) // BLOCK - before
    full = tl.where(inside, tl.maximum(full, 0), 0)
    return low, before, full, blocks - full


@triton.jit
def listed(p_counts, b, h, n, count, rows_b, rows_h, width):
    """A block's list in a table: offset of its first entry, entries that are full, entries that are masked."""
    row = b * rows_b + h * rows_h + n
    return row * width, tl.load(p_counts + row * 2 + 1), tl.load(p_counts + row * 2)


@triton.jit
def low_of(p_list, first, t, before, full, masked, whole: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr):
    """First position of the t-th of the tiles that are masked, or kept whole."""
    if TABLE:
        low = tl.load(p_list + first + (masked if whole else 0) + t) * BLOCK
    else:
        low = first + (t + (before if whole else tl.where(t < before, 0, full))) * BLOCK
    return low


@triton.jit
def flash_forward(
    p_q, p_k, p_v, p_out, p_lse, captured, p_list, p_counts,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, o_b, o_h, o_l, o_e, rows_b, rows_h, Hq, L, S,
    GROUP: tl.constexpr, E: tl.constexpr, E_MAIN: tl.constexpr, E_TAIL: tl.constexpr,
    EV: tl.constexpr, EV_MAIN: tl.constexpr, EV_TAIL: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr, SECTION: tl.constexpr, XCDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT8: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of rows; later blocks, which see more keys in causal masks, start first."""
    FACTOR: tl.constexpr = LOG2E if SCALE == 0.0 else SCALE * LOG2E
    QK: tl.constexpr = p_q.dtype.element_ty if DOT8 else p_out.dtype.element_ty
    count = tl.cdiv(L, BLOCK_M)
    n, head = place(count, SECTION, XCDS)
    n = count - 1 - n
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    i_low = n * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i = (i_low + row)[:, None]
    m_row = i_low + row < L
    p_q += b * q_b + h * q_h + i_low.to(tl.int64) * q_l
    p_k += b * k_b + h // GROUP * k_h
    p_v += b * v_b + h // GROUP * v_h
    q = tile(p_q, row, q_l, q_e, m_row, 0, E_MAIN, E, True).to(QK)
    q_tail = q
    if E_TAIL > 0:
        q_tail = tile(p_q, row, q_l, q_e, m_row, E_MAIN, E_TAIL, E, True).to(QK)
    if TABLE:
        first, full, masked = listed(p_counts, b, h, n, count, rows_b, rows_h, tl.cdiv(S, BLOCK_N))
        before = masked
    else:
        low, high, full_low, full_high = visit(b, h, i_low, tl.minimum(i_low + BLOCK_M, L), L, S, captured)
        first, before, full, masked = split(low, high, full_low, full_high, S, i_low + BLOCK_M <= L, BLOCK_N)

    # A sink is a key of its own: weight 1 at its own logit, no value.
    m = tl.max(tl.zeros([BLOCK_M, 1], tl.float32) + sink(b, h, i, captured), 1) * LOG2E
    total = tl.where(m > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, EV_MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_M, EV_TAIL if EV_TAIL > 0 else 1], tl.float32)
    for whole in tl.static_range(2):
        for t in tl.range(0, full if whole else masked):
            j_low = low_of(p_list, first, t, before, full, masked, whole, TABLE, BLOCK_N)
            j = (j_low + column)[None, :]
            m_column = j_low + column < S
            m_ok = tl.full([1, 1], 1, tl.int1) if whole else (i < L) & (j < S)
            p_kj, p_vj = p_k + j_low.to(tl.int64) * k_l, p_v + j_low.to(tl.int64) * v_l
            s, _k, _tail = product(q, q_tail, p_kj, column, k_l, k_e, m_column, E_MAIN, E_TAIL, E, whole == 0, QK,
                                   PRECISION)  # fmt: skip
            x = logits(s, b, h, i, j, m_ok, captured, SCALE, whole == 0)
            p, alpha, m, total = soften(x, m, total, FACTOR, whole == 1 and SCALE != 0.0)
            p = p.to(p_out.dtype.element_ty)  # weights and values of 8 bits meet in the precision of out
            acc, acc_tail = weighted(acc, acc_tail, p, alpha, p_vj, column, v_l, v_e, m_column, EV_MAIN, EV_TAIL, EV,
                                     whole == 0, PRECISION)  # fmt: skip

    lse, share = settled(m, total)
    tl.store(p_lse + (b * Hq + h) * L + i_low + row, lse * LN2, mask=m_row)
    share = share[:, None] * gain(b, h, i, captured)
    p_out += b * o_b + h * o_h + i_low.to(tl.int64) * o_l
    put(p_out, acc * share, row, o_l, o_e, m_row, 0, EV_MAIN, EV)
    if EV_TAIL > 0:
        put(p_out, acc_tail * share, row, o_l, o_e, m_row, EV_MAIN, EV_TAIL, EV)


@triton.jit
def flash_dq(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, captured, captured_grads, p_list, p_counts,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, o_b, o_h, o_l, o_e, d_b, d_h, d_l, d_e,
    rows_b, rows_h, Hq, L, S,
    GROUP: tl.constexpr, E: tl.constexpr, E_MAIN: tl.constexpr, E_TAIL: tl.constexpr,
    EV: tl.constexpr, EV_MAIN: tl.constexpr, EV_TAIL: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr, SECTION: tl.constexpr, XCDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """dq of one block of rows, and what its tiles add to the gradients of captured tensors.

    p_lse: lse in powers of two, +inf for rows without keys; o_: strides of d out, d_: of dq.
    SWEEPS: with 2, a first pass over the tiles finds delta as sum_j p_ij (do_i . v_j) / sum_j p_ij and writes it for
    `flash_dkv`; the quotient takes back what rounding of lse does to all p of a row.
    """
    FACTOR: tl.constexpr = LOG2E if SCALE == 0.0 else SCALE * LOG2E
    count = tl.cdiv(L, BLOCK_M)
    n, head = place(count, SECTION, XCDS)
    n = count - 1 - n
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    i_low = n * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i = (i_low + row)[:, None]
    m_row = i_low + row < L
    p_q += b * q_b + h * q_h + i_low.to(tl.int64) * q_l
    p_do += b * o_b + h * o_h + i_low.to(tl.int64) * o_l
    p_k += b * k_b + h // GROUP * k_h
    p_v += b * v_b + h // GROUP * v_h
    q = tile(p_q, row, q_l, q_e, m_row, 0, E_MAIN, E, True).to(p_do.dtype.element_ty)
    do = tile(p_do, row, o_l, o_e, m_row, 0, EV_MAIN, EV, True)
    dq = tl.zeros([BLOCK_M, E_MAIN], tl.float32)
    q_tail, do_tail = q, do
    if E_TAIL > 0:
        q_tail = tile(p_q, row, q_l, q_e, m_row, E_MAIN, E_TAIL, E, True).to(do.dtype)
        dq_tail = tl.zeros([BLOCK_M, E_TAIL], tl.float32)
    if EV_TAIL > 0:
        do_tail = tile(p_do, row, o_l, o_e, m_row, EV_MAIN, EV_TAIL, EV, True)
    at = (b * Hq + h) * L + i_low + row
    lse = tl.load(p_lse + at, mask=m_row, other=float("inf"))[:, None]
    delta = tl.load(p_delta + at, mask=m_row, other=0.0)[:, None]
    if TABLE:
        first, full, masked = listed(p_counts, b, h, n, count, rows_b, rows_h, tl.cdiv(S, BLOCK_N))
        before = masked
    else:
        low, high, full_low, full_high = visit(b, h, i_low, tl.minimum(i_low + BLOCK_M, L), L, S, captured)
        first, before, full, masked = split(low, high, full_low, full_high, S, i_low + BLOCK_M <= L, BLOCK_N)
    for sweep in tl.static_range(SWEEPS):
        found, total = tl.zeros([BLOCK_M, 1], tl.float32), tl.zeros([BLOCK_M, 1], tl.float32)
        for whole in tl.static_range(2):
            for t in tl.range(0, full if whole else masked):
                j_low = low_of(p_list, first, t, before, full, masked, whole, TABLE, BLOCK_N)
                j = (j_low + column)[None, :]
                m_column = j_low + column < S
                m_ok = tl.full([1, 1], 1, tl.int1) if whole else (i < L) & (j < S)
                p_kj, p_vj = p_k + j_low.to(tl.int64) * k_l, p_v + j_low.to(tl.int64) * v_l
                s, k, k_tail = product(q, q_tail, p_kj, column, k_l, k_e, m_column, E_MAIN, E_TAIL, E, whole == 0,
                                       do.dtype, PRECISION)  # fmt: skip
                dp, _v, _tail = product(do, do_tail, p_vj, column, v_l, v_e, m_column, EV_MAIN, EV_TAIL, EV, whole == 0,
                                        do.dtype, PRECISION)  # fmt: skip
                x = logits(s, b, h, i, j, m_ok, captured, SCALE, False)
                p = weights(x, lse, b, h, i, j, m_ok, captured, FACTOR, whole == 0)
                if sweep + 1 < SWEEPS:
                    found += tl.sum(p * dp, 1)[:, None]
                    total += tl.sum(p, 1)[:, None]
                else:
                    d_score = p * (dp - delta)
                    add_grads(d_score, s, b, h, i, j, m_ok, captured, captured_grads)
                    ds = slopes(d_score, s, b, h, i, j, m_ok, captured, SCALE, whole == 0).to(do.dtype)
                    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
                    if E_TAIL > 0:
                        dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
        if sweep + 1 < SWEEPS:
            total += tl.exp2((tl.zeros([BLOCK_M, 1], tl.float32) + sink(b, h, i, captured)) * LOG2E - lse)
            delta = tl.where(total > 0.0, found / total, 0.0)
            tl.store(p_delta + at[:, None], delta, mask=m_row[:, None])

    left: tl.constexpr = 1.0 if SCALE == 0.0 else SCALE
    p_dq += b * d_b + h * d_h + i_low.to(tl.int64) * d_l
    put(p_dq, dq * left, row, d_l, d_e, m_row, 0, E_MAIN, E)
    if E_TAIL > 0:
        put(p_dq, dq_tail * left, row, d_l, d_e, m_row, E_MAIN, E_TAIL, E)


@triton.jit
def flash_dkv(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, captured, p_list, p_counts,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, o_b, o_h, o_l, o_e,
    dk_b, dk_h, dk_l, dk_e, dv_b, dv_h, dv_l, dv_e, rows_b, rows_h, Hq, L, S,
    GROUP: tl.constexpr, E: tl.constexpr, E_MAIN: tl.constexpr, E_TAIL: tl.constexpr,
    EV: tl.constexpr, EV_MAIN: tl.constexpr, EV_TAIL: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr, SECTION: tl.constexpr, XCDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys over all heads that read them; tiles of keys by rows keep weights in registers."""
    FACTOR: tl.constexpr = LOG2E if SCALE == 0.0 else SCALE * LOG2E
    count = tl.cdiv(S, BLOCK_N)
    n, head = place(count, SECTION, XCDS)
    H = Hq // GROUP
    b, h_k = (head // H).to(tl.int64), (head % H).to(tl.int64)
    j_low = n * BLOCK_N
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j = (j_low + column)[:, None]
    m_column = j_low + column < S
    p_k += b * k_b + h_k * k_h + j_low.to(tl.int64) * k_l
    p_v += b * v_b + h_k * v_h + j_low.to(tl.int64) * v_l
    k = tile(p_k, column, k_l, k_e, m_column, 0, E_MAIN, E, True).to(p_do.dtype.element_ty)
    v = tile(p_v, column, v_l, v_e, m_column, 0, EV_MAIN, EV, True).to(k.dtype)
    dk = tl.zeros([BLOCK_N, E_MAIN], tl.float32)
    dv = tl.zeros([BLOCK_N, EV_MAIN], tl.float32)
    k_tail, v_tail = k, v
    if E_TAIL > 0:
        k_tail = tile(p_k, column, k_l, k_e, m_column, E_MAIN, E_TAIL, E, True).to(k.dtype)
        dk_tail = tl.zeros([BLOCK_N, E_TAIL], tl.float32)
    if EV_TAIL > 0:
        v_tail = tile(p_v, column, v_l, v_e, m_column, EV_MAIN, EV_TAIL, EV, True).to(k.dtype)
        dv_tail = tl.zeros([BLOCK_N, EV_TAIL], tl.float32)
    for member in tl.range(0, GROUP):
        h = h_k * GROUP + member
        if TABLE:
            first, full, masked = listed(p_counts, b, h, n, count, rows_b, rows_h, tl.cdiv(L, BLOCK_M))
            before = masked
        else:
            low, high, full_low, full_high = visit_rows(b, h, j_low, tl.minimum(j_low + BLOCK_N, S), L, S, captured)
            first, before, full, masked = split(low, high, full_low, full_high, L, j_low + BLOCK_N <= S, BLOCK_M)
        for whole in tl.static_range(2):
            for t in tl.range(0, full if whole else masked):
                i_low = low_of(p_list, first, t, before, full, masked, whole, TABLE, BLOCK_M)
                i = (i_low + row)[None, :]
                m_row = i_low + row < L
                m_ok = tl.full([1, 1], 1, tl.int1) if whole else (i < L) & (j < S)
                p_qi = p_q + b * q_b + h * q_h + i_low.to(tl.int64) * q_l
                p_doi = p_do + b * o_b + h * o_h + i_low.to(tl.int64) * o_l
                at = (b * Hq + h) * L + i_low + row
                lse = tl.load(p_lse + at, mask=m_row | (whole == 1), other=float("inf"))
                delta = tl.load(p_delta + at, mask=m_row | (whole == 1), other=0.0)
                s, q, q_tail = product(k, k_tail, p_qi, row, q_l, q_e, m_row, E_MAIN, E_TAIL, E, whole == 0, k.dtype,
                                       PRECISION)  # fmt: skip
                dp, do, do_tail = product(v, v_tail, p_doi, row, o_l, o_e, m_row, EV_MAIN, EV_TAIL, EV, whole == 0,
                                          k.dtype, PRECISION)  # fmt: skip
                x = logits(s, b, h, i, j, m_ok, captured, SCALE, False)
                p = weights(x, lse[None, :], b, h, i, j, m_ok, captured, FACTOR, whole == 0)
                dv = tl.dot(p.to(k.dtype), do, dv, input_precision=PRECISION)
                ds = slopes(p * (dp - delta[None, :]), s, b, h, i, j, m_ok, captured, SCALE, whole == 0).to(k.dtype)
                dk = tl.dot(ds, q, dk, input_precision=PRECISION)
                if E_TAIL > 0:
                    dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
                if EV_TAIL > 0:
                    dv_tail = tl.dot(p.to(k.dtype), do_tail, dv_tail, input_precision=PRECISION)

    left: tl.constexpr = 1.0 if SCALE == 0.0 else SCALE
    p_dk += b * dk_b + h_k * dk_h + j_low.to(tl.int64) * dk_l
    p_dv += b * dv_b + h_k * dv_h + j_low.to(tl.int64) * dv_l
    put(p_dk, dk * left, column, dk_l, dk_e, m_column, 0, E_MAIN, E)
    put(p_dv, dv, column, dv_l, dv_e, m_column, 0, EV_MAIN, EV)
    if E_TAIL > 0:
        put(p_dk, dk_tail * left, column, dk_l, dk_e, m_column, E_MAIN, E_TAIL, E)
    if EV_TAIL > 0:
        put(p_dv, dv_tail, column, dv_l, dv_e, m_column, EV_MAIN, EV_TAIL, EV)
