"""Softmax attention of tiles with their own lists of keys, and its gradients. Unfilled each list is attended whole.

    tile t:  rows rows[t, :]  x  keys blocks[t, n] * WIDTH + 0 .. WIDTH - 1 of the key head place[t]
    out_p, lse_p of part p of a row: its tile's keys alone;   gradients as in skeleton flash, under the lse of all parts

Shapes: as in skeleton flash. rows (T, M), a row and its part as part << 48 | h << 32 | i, negative for none; blocks
(T, N), negative for none; place (T,), b * H + head; counts (T,) int32, places of a list behind which nothing is.
added (T, N * WIDTH), to the scores of a tile's keys, or None. out of parts (parts, B, Hq, L, EV) and lse in powers of
two, float32; FINAL, where a row has one part: out as flash gives it, under the sink, and lse natural. DIAGONAL: row m
of a tile keeps its first m + 1 keys. A row may be in several tiles, each time as another part. WIDE: offsets inside a
batch entry may need 64 bits.

A program of the forward and of dq takes BLOCK_M rows of a tile and gathers BLOCK_N keys of its list at a time; blocks
that BLOCK_N divides are read in one piece, others key by key. dk and dv of a block: the rows of all tiles that list it,
gathered BLOCK_M at a time (order: tiles sorted by block; a program takes those from first to end of its block, added
by atomics where a block has several programs); SCATTER: by atomics from the tiles of dq instead, for lists of single
keys, where a block fills no tile.

Holes: b is a scalar, h and i columns, j a row (`list_dkv`: rows and a column).

Source: Yuan et al. 2025, "Native Sparse Attention", arXiv:2502.11089, section 3.4 (rows of a group, gathered blocks);
Lu et al. 2025, "MoBA", arXiv:2502.13189, algorithm 1 (rows sorted by block); DeepSeek-AI 2025, "DeepSeek-V3.2",
arXiv:2512.02556 (gathered keys).
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

HOLES = ("keep", "score", "score_slope", "add_grads_of_rows", "sink", "gain")


@triton.jit
def add_grads_of_rows(d_score, s, b, h, i, j, m_ok, captured, captured_grads):
    """Add d loss / d captured tensors of a tile (h and i columns) into their buffers."""
    return


@triton.jit
def rows_of(p_rows, at, m_row, INDEX: tl.constexpr):
    """Head, position and part of rows; whether they are there."""
    row = tl.load(p_rows + at, mask=m_row, other=-1)
    m_row = row >= 0
    row = tl.maximum(row, 0)
    return ((row >> 32) & 0xFFFF).to(INDEX), (row & 0xFFFFFFFF).to(INDEX), row >> 48, m_row


@triton.jit
def keys_of(p_list, low, count, S, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, INDEX: tl.constexpr):
    """Keys at places low .. low + BLOCK_N - 1 of a list: a first one, distances from it; whether they are there."""
    column = tl.arange(0, BLOCK_N)
    if WIDTH % BLOCK_N == 0:
        block = tl.load(p_list + low // WIDTH)
        first, key = tl.maximum(block, 0) * WIDTH + low % WIDTH, column
        m_column = first + column < tl.where(block >= 0, S, 0)
    else:
        at = low + column
        key = tl.load(p_list + at // WIDTH, mask=at < count * WIDTH, other=-1) * WIDTH + at % WIDTH
        m_column = (key >= 0) & (key < S)
        first, key = tl.zeros([], tl.int64), tl.where(m_column, key, 0).to(INDEX)
    return first, key, m_column


@triton.jit
def raised(x, p_added, at, m, SCALE: tl.constexpr):
    """Scores with what a list adds to those of its keys, in their units."""
    if p_added is not None:
        more = tl.load(p_added + at, mask=m, other=0.0)
        x += more if SCALE == 0.0 else more / SCALE
    return x


@triton.jit
def scatter(p, x, row, stride, column_stride, m_row, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Add to columns FIRST .. FIRST + BLOCK of rows."""
    column = FIRST + tl.arange(0, BLOCK)
    at = p + row[:, None] * stride + column[None, :] * column_stride
    tl.atomic_add(at, x, mask=m_row[:, None] & (column < WIDTH)[None, :], sem="relaxed")


@triton.jit
def list_forward(
    p_q, p_k, p_v, p_out, p_lse, captured, p_rows, p_blocks, p_place, p_counts, p_added,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, o_p, o_b, o_h, o_l, o_e, B, Hq, H, L, S, N,
    E: tl.constexpr, E_MAIN: tl.constexpr, E_TAIL: tl.constexpr,
    EV: tl.constexpr, EV_MAIN: tl.constexpr, EV_TAIL: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    FINAL: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of a tile's rows."""
    FACTOR: tl.constexpr = LOG2E if SCALE == 0.0 else SCALE * LOG2E
    KIND: tl.constexpr = p_q.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    chunks: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    at = tl.program_id(0)
    t = (at // chunks).to(tl.int64)
    inside = at % chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    place = tl.load(p_place + t)
    b, h_k = place // H, place % H
    head, position, part, m_row = rows_of(p_rows, t * M + inside, inside < M, INDEX)
    row = (b * Hq + head) * L + position
    h, i = head[:, None], position.to(tl.int32)[:, None]
    count = tl.load(p_counts + t)
    p_blocks += t * N
    p_k += b * k_b + h_k * k_h
    p_v += b * v_b + h_k * v_h
    q_row = head * q_h + position * q_l
    q = tile(p_q + b * q_b, q_row, 1, q_e, m_row, 0, E_MAIN, E, True)
    q_tail = q
    if E_TAIL > 0:
        q_tail = tile(p_q + b * q_b, q_row, 1, q_e, m_row, E_MAIN, E_TAIL, E, True)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if FINAL:
        m = tl.max(tl.zeros([BLOCK_M, 1], tl.float32) + sink(b, h, i, captured), 1) * LOG2E
    total = tl.where(m > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, EV_MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_M, EV_TAIL if EV_TAIL > 0 else 1], tl.float32)
    for low in tl.range(0, count * WIDTH, BLOCK_N):
        first, key, m_column = keys_of(p_blocks, low, count, S, WIDTH, BLOCK_N, INDEX)
        j = (first + key).to(tl.int32)[None, :]
        p_kj, p_vj = p_k + first * k_l, p_v + first * v_l
        m_ok = m_column[None, :]  # a row that is not there is not written
        if DIAGONAL:
            m_ok = m_ok & ((low + column)[None, :] <= inside[:, None])
        s, _k, _tail = product(q, q_tail, p_kj, key, k_l, k_e, m_column, E_MAIN, E_TAIL, E, True, KIND, PRECISION)
        x = logits(s, b, h, i, j, m_ok, captured, SCALE, True)
        x = raised(x, p_added, (t * N * WIDTH + low + column)[None, :], m_column[None, :], SCALE)
        p, alpha, m, total = soften(x, m, total, FACTOR, False)
        acc, acc_tail = weighted(acc, acc_tail, p.to(KIND), alpha, p_vj, key, v_l, v_e, m_column, EV_MAIN, EV_TAIL, EV,
                                 True, PRECISION)  # fmt: skip

    lse, share = settled(m, total)
    p_lse += part * (B * Hq * L) + row
    share = share[:, None]
    if FINAL:
        lse *= LN2
        share *= gain(b, h, i, captured)
    tl.store(p_lse, lse, mask=m_row)
    out_row = part * o_p + head.to(tl.int64) * o_h + position.to(tl.int64) * o_l
    put(p_out + b * o_b, acc * share, out_row, 1, o_e, m_row, 0, EV_MAIN, EV)
    if EV_TAIL > 0:
        put(p_out + b * o_b, acc_tail * share, out_row, 1, o_e, m_row, EV_MAIN, EV_TAIL, EV)


@triton.jit
def list_dq(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, p_dk, p_dv, captured, captured_grads,
    p_rows, p_blocks, p_place, p_counts, p_added,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, o_b, o_h, o_l, o_e, d_p, d_b, d_h, d_l, d_e,
    B, Hq, H, L, S, N,
    E: tl.constexpr, E_MAIN: tl.constexpr, E_TAIL: tl.constexpr,
    EV: tl.constexpr, EV_MAIN: tl.constexpr, EV_TAIL: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    SCATTER: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dq of one block of a tile's rows, and what its pairs add to the gradients of captured tensors.

    p_lse: lse of all parts in powers of two, +inf for rows without keys; o_: strides of d out, d_: of dq, by part too.
    SCATTER: dk and dv too, contiguous float32.
    """
    FACTOR: tl.constexpr = LOG2E if SCALE == 0.0 else SCALE * LOG2E
    KIND: tl.constexpr = p_q.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    left: tl.constexpr = 1.0 if SCALE == 0.0 else SCALE
    chunks: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    at = tl.program_id(0)
    t = (at // chunks).to(tl.int64)
    inside = at % chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    place = tl.load(p_place + t)
    b, h_k = place // H, place % H
    head, position, part, m_row = rows_of(p_rows, t * M + inside, inside < M, INDEX)
    row = (b * Hq + head) * L + position
    h, i = head[:, None], position.to(tl.int32)[:, None]
    count = tl.load(p_counts + t)
    p_blocks += t * N
    p_k += b * k_b + h_k * k_h
    p_v += b * v_b + h_k * v_h
    q_row, do_row = head * q_h + position * q_l, head * o_h + position * o_l
    q = tile(p_q + b * q_b, q_row, 1, q_e, m_row, 0, E_MAIN, E, True)
    do = tile(p_do + b * o_b, do_row, 1, o_e, m_row, 0, EV_MAIN, EV, True)
    q_tail, do_tail = q, do
    dq = tl.zeros([BLOCK_M, E_MAIN], tl.float32)
    if E_TAIL > 0:
        q_tail = tile(p_q + b * q_b, q_row, 1, q_e, m_row, E_MAIN, E_TAIL, E, True)
        dq_tail = tl.zeros([BLOCK_M, E_TAIL], tl.float32)
    if EV_TAIL > 0:
        do_tail = tile(p_do + b * o_b, do_row, 1, o_e, m_row, EV_MAIN, EV_TAIL, EV, True)
    lse = tl.load(p_lse + row, mask=m_row, other=float("inf"))[:, None]
    delta = tl.load(p_delta + row, mask=m_row, other=0.0)[:, None]
    for low in tl.range(0, count * WIDTH, BLOCK_N):
        first, key, m_column = keys_of(p_blocks, low, count, S, WIDTH, BLOCK_N, INDEX)
        j = (first + key).to(tl.int32)[None, :]
        p_kj, p_vj = p_k + first * k_l, p_v + first * v_l
        m_ok = m_row[:, None] & m_column[None, :]
        if DIAGONAL:
            m_ok = m_ok & ((low + column)[None, :] <= inside[:, None])
        s, k, k_tail = product(q, q_tail, p_kj, key, k_l, k_e, m_column, E_MAIN, E_TAIL, E, True, KIND, PRECISION)
        dp, _v, _tail = product(do, do_tail, p_vj, key, v_l, v_e, m_column, EV_MAIN, EV_TAIL, EV, True, KIND, PRECISION)
        x = logits(s, b, h, i, j, m_ok, captured, SCALE, False)
        x = raised(x, p_added, (t * N * WIDTH + low + column)[None, :], m_column[None, :], SCALE)
        p = weights(x, lse, b, h, i, j, m_ok, captured, FACTOR, True)
        d_score = p * (dp - delta)
        add_grads_of_rows(d_score, s, b, h, i, j, m_ok, captured, captured_grads)
        ds = slopes(d_score, s, b, h, i, j, m_ok, captured, SCALE, True).to(KIND)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if E_TAIL > 0:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
        if SCATTER:
            at_key = place * S + first + key
            part_k = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * left
            part_v = tl.dot(tl.trans(p.to(KIND)), do, input_precision=PRECISION)
            scatter(p_dk, part_k, at_key, E, 1, m_column, 0, E_MAIN, E)
            scatter(p_dv, part_v, at_key, EV, 1, m_column, 0, EV_MAIN, EV)
            if E_TAIL > 0:
                part_k = tl.dot(tl.trans(ds), q_tail, input_precision=PRECISION) * left
                scatter(p_dk, part_k, at_key, E, 1, m_column, E_MAIN, E_TAIL, E)
            if EV_TAIL > 0:
                part_v = tl.dot(tl.trans(p.to(KIND)), do_tail, input_precision=PRECISION)
                scatter(p_dv, part_v, at_key, EV, 1, m_column, EV_MAIN, EV_TAIL, EV)

    dq_row = part * d_p + head.to(tl.int64) * d_h + position.to(tl.int64) * d_l
    put(p_dq + b * d_b, dq * left, dq_row, 1, d_e, m_row, 0, E_MAIN, E)
    if E_TAIL > 0:
        put(p_dq + b * d_b, dq_tail * left, dq_row, 1, d_e, m_row, E_MAIN, E_TAIL, E)


@triton.jit
def list_dkv(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, captured,
    p_rows, p_order, p_columns, p_block, p_first, p_end, p_added,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, o_b, o_h, o_l, o_e, B, Hq, H, L, S, N, BLOCKS,
    E: tl.constexpr, E_MAIN: tl.constexpr, E_TAIL: tl.constexpr,
    EV: tl.constexpr, EV_MAIN: tl.constexpr, EV_TAIL: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, of some tiles, added to what is there, contiguous float32; columns: of lists."""
    FACTOR: tl.constexpr = LOG2E if SCALE == 0.0 else SCALE * LOG2E
    KIND: tl.constexpr = p_q.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    chunks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    at = tl.program_id(0)
    bucket = tl.load(p_block + at // chunks)
    first, end = tl.load(p_first + at // chunks) * M, tl.load(p_end + at // chunks) * M
    place = bucket // BLOCKS
    b, h_k = place // H, place % H
    inside = at % chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = bucket % BLOCKS * WIDTH + inside
    m_column = (inside < tl.where(first < end, WIDTH, 0)) & (wide < S)  # of none, where the program has none
    wide = tl.where(m_column, wide, 0)
    j = wide.to(tl.int32)[:, None]
    p_k += b * k_b + h_k * k_h
    p_v += b * v_b + h_k * v_h
    k = tile(p_k, wide, k_l, k_e, m_column, 0, E_MAIN, E, True)
    v = tile(p_v, wide, v_l, v_e, m_column, 0, EV_MAIN, EV, True)
    k_tail, v_tail = k, v
    dk = tl.zeros([BLOCK_N, E_MAIN], tl.float32)
    dv = tl.zeros([BLOCK_N, EV_MAIN], tl.float32)
    if E_TAIL > 0:
        k_tail = tile(p_k, wide, k_l, k_e, m_column, E_MAIN, E_TAIL, E, True)
        dk_tail = tl.zeros([BLOCK_N, E_TAIL], tl.float32)
    if EV_TAIL > 0:
        v_tail = tile(p_v, wide, v_l, v_e, m_column, EV_MAIN, EV_TAIL, EV, True)
        dv_tail = tl.zeros([BLOCK_N, EV_TAIL], tl.float32)
    for low in tl.range(first, end, BLOCK_M):
        step = low + tl.arange(0, BLOCK_M)
        t = tl.load(p_order + step // M, mask=step < end, other=0).to(tl.int64)
        head, position, _part, m_row = rows_of(p_rows, t * M + step % M, step < end, INDEX)
        row = (b * Hq + head) * L + position
        h, i = head[None, :], position.to(tl.int32)[None, :]
        m_ok = m_column[:, None] & m_row[None, :]
        if p_columns is not None:
            column = tl.load(p_columns + step // M, mask=step < end, other=0) * WIDTH
        if DIAGONAL:
            m_ok = m_ok & (column[None, :] + inside[:, None] <= (step % M)[None, :])
        lse = tl.load(p_lse + row, mask=m_row, other=float("inf"))
        delta = tl.load(p_delta + row, mask=m_row, other=0.0)
        q_row, do_row = head * q_h + position * q_l, head * o_h + position * o_l
        s, q, q_tail = product(k, k_tail, p_q + b * q_b, q_row, 1, q_e, m_row, E_MAIN, E_TAIL, E, True, KIND, PRECISION)
        dp, do, do_tail = product(v, v_tail, p_do + b * o_b, do_row, 1, o_e, m_row, EV_MAIN, EV_TAIL, EV, True, KIND,
                                  PRECISION)  # fmt: skip
        x = logits(s, b, h, i, j, m_ok, captured, SCALE, False)
        if p_added is not None:
            x = raised(x, p_added, (t * N * WIDTH + column)[None, :] + inside[:, None], m_ok, SCALE)
        p = weights(x, lse[None, :], b, h, i, j, m_ok, captured, FACTOR, True)
        ds = slopes(p * (dp - delta[None, :]), s, b, h, i, j, m_ok, captured, SCALE, True).to(KIND)
        dv = tl.dot(p.to(KIND), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if E_TAIL > 0:
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
        if EV_TAIL > 0:
            dv_tail = tl.dot(p.to(KIND), do_tail, dv_tail, input_precision=PRECISION)

    left: tl.constexpr = 1.0 if SCALE == 0.0 else SCALE
    at_key = place * S + wide
    scatter(p_dk, dk * left, at_key, E, 1, m_column, 0, E_MAIN, E)
    scatter(p_dv, dv, at_key, EV, 1, m_column, 0, EV_MAIN, EV)
    if E_TAIL > 0:
        scatter(p_dk, dk_tail * left, at_key, E, 1, m_column, E_MAIN, E_TAIL, E)
    if EV_TAIL > 0:
        scatter(p_dv, dv_tail, at_key, EV, 1, m_column, EV_MAIN, EV_TAIL, EV)
