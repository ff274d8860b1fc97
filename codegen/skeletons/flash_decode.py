"""Softmax attention of few query rows over many keys, split over the keys. Unfilled it is dense attention.

    flash_decode:   out_p, lse_p of the keys of part p;    flash_combine:   lse = log(exp(sink) + sum_p exp(lse_p)),
                                                           out = sum_p exp(lse_p - lse) out_p

Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, EV), out as query with EV columns, each with any strides;
parts (SPLITS, B, Hq, L, EV) and their lse (SPLITS, B, Hq, L) in powers of two, both contiguous float32; lse (B, Hq, L).
The rows of all query heads that read one key head (head h // GROUP) lie in one tile, so keys are read once for them. A
row without keys gives out 0 and lse -inf. A part that keeps no key of a row writes its lse only.

Parts divide the keys that `visit` says, not S: sequences of any length keep all parts busy. A width is a power of two
plus a tail that is one: 576 = 512 + 64. VALUE_IN_KEY: the value is the key's first EV_MAIN columns (absorbed latent
attention), which are read once. Operands of 8 bits are widened to the query's type, or bfloat16; DOT8: queries and keys
of 8 bits are multiplied as they are.

Holes: b is a scalar (int64), h and i are columns, j is a row; in `flash_combine` b, h and i go along the rows. SCALE:
the score is SCALE * s, or 0: `score` says. HEADS_ALIKE: whether `visit` is the same for all heads.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference", pytorch.org/blog/flash-decoding; DeepSeek-AI 2024,
"DeepSeek-V2", arXiv:2405.04434, section 2.1 (absorbed projections).
"""

import triton
import triton.language as tl

HOLES = ("keep", "score", "sink", "gain", "visit")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def keep(b, h, i, j, m_ok, captured):
    """Whether pairs are kept, bool."""
    return m_ok


@triton.jit
def score(s, b, h, i, j, m_ok, captured):
    """Natural logits of the products s, float32."""
    return s


@triton.jit
def sink(b, h, i, captured):
    """The logit of a row's sink, float32; -inf: none."""
    return float("-inf")


@triton.jit
def gain(b, h, i, captured):
    """A factor of a row's output, float32."""
    return 1.0


@triton.jit
def visit(b, h, i_low, i_high, L, S, captured):
    """Keys that some row of i_low .. i_high - 1 may keep, first and end; those that every one of these rows keeps."""
    return 0, S, 0, S


@triton.jit
def part(b, h_low, n, L, S, captured, SPLITS, GROUP: tl.constexpr, HEADS_ALIKE: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key and end of part n: whole blocks, as many in each part."""
    low, high, _full_low, _full_high = visit(b, h_low, 0, L, L, S, captured)
    if not HEADS_ALIKE:
        for member in range(1, GROUP):
            first, end, _full_low, _full_high = visit(b, h_low + member, 0, L, L, S, captured)
            low, high = tl.minimum(low, first), tl.maximum(high, end)
    low = tl.maximum(low, 0) // BLOCK_N * BLOCK_N
    high = tl.minimum(high, S)
    each = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), SPLITS) * BLOCK_N
    return low + n * each, tl.minimum(low + (n + 1) * each, high)


@triton.jit
def tile(p, m_row, column_stride, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST .. FIRST + BLOCK of rows that begin at p; 0 beyond WIDTH and where m_row fails."""
    column = FIRST + tl.arange(0, BLOCK)
    m = m_row[:, None] & (column < WIDTH)[None, :] if FIRST + BLOCK > WIDTH else m_row[:, None]
    return tl.load(p[:, None] + column[None, :] * column_stride, mask=m, other=0.0)


@triton.jit
def flash_decode(
    p_q, p_k, p_v, p_parts, p_lse, captured,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, B, H, L, S, SPLITS,
    GROUP: tl.constexpr, E: tl.constexpr, E_MAIN: tl.constexpr, E_TAIL: tl.constexpr,
    EV: tl.constexpr, EV_MAIN: tl.constexpr, EV_TAIL: tl.constexpr, VALUE_IN_KEY: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, DOT8: tl.constexpr, HEADS_ALIKE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of one part of the keys, for one block of the rows that share a key head."""
    FACTOR: tl.constexpr = LOG2E if SCALE == 0.0 else SCALE * LOG2E
    DOT: tl.constexpr = tl.bfloat16 if p_q.dtype.element_ty.primitive_bitwidth == 8 else p_q.dtype.element_ty
    QK: tl.constexpr = p_q.dtype.element_ty if DOT8 else DOT
    blocks = tl.cdiv(GROUP * L, BLOCK_M)
    at = tl.program_id(0)
    n = at // blocks % SPLITS
    b, h_k = (at // (blocks * SPLITS) // H).to(tl.int64), (at // (blocks * SPLITS) % H).to(tl.int64)
    row = at % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # of GROUP * L, head by head
    m_row = row < GROUP * L
    row = tl.minimum(row, GROUP * L - 1)
    head, i_row = h_k * GROUP + row // L, row % L
    h, i = head[:, None], i_row[:, None]
    p_qi = p_q + b * q_b + head * q_h + i_row * q_l
    q = tile(p_qi, m_row, q_e, 0, E_MAIN, E).to(QK)
    if E_TAIL > 0:
        q_tail = tile(p_qi, m_row, q_e, E_MAIN, E_TAIL, E).to(QK)
    first, end = part(b, h_k * GROUP, n, L, S, captured, SPLITS, GROUP, HEADS_ALIKE, BLOCK_N)
    column = tl.arange(0, BLOCK_N)
    p_k += b * k_b + h_k * k_h
    p_v += b * v_b + h_k * v_h

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, EV_MAIN], tl.float32)
    if EV_TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, EV_TAIL], tl.float32)
    for j_low in tl.range(first, end, BLOCK_N):
        m_column = j_low + column < end
        j = (j_low + column)[None, :]
        m_ok = m_row[:, None] & m_column[None, :]
        p_kj = p_k + tl.cast(j_low, tl.int64) * k_l + column * k_l
        k = tile(p_kj, m_column, k_e, 0, E_MAIN, E).to(QK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if E_TAIL > 0:
            k_tail = tile(p_kj, m_column, k_e, E_MAIN, E_TAIL, E).to(QK)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
        x = score(s, b, h, i, j, m_ok, captured) if SCALE == 0.0 else s
        x = tl.where(m_ok & keep(b, h, i, j, m_ok, captured), x * FACTOR, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: -inf - -inf is no weight
        p = tl.exp2(x - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        m = m_new
        p = p.to(DOT)
        if VALUE_IN_KEY:
            v = k.to(DOT)
        else:
            p_vj = p_v + tl.cast(j_low, tl.int64) * v_l + column * v_l
            v = tile(p_vj, m_column, v_e, 0, EV_MAIN, EV).to(DOT)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
        if EV_TAIL > 0:
            v_tail = tile(p_vj, m_column, v_e, EV_MAIN, EV_TAIL, EV).to(DOT)
            acc_tail = tl.dot(p, v_tail, acc_tail * alpha[:, None], input_precision=PRECISION)

    some = total != 0.0  # a NaN is not no key
    total = tl.where(some, total, 1.0)
    place = ((n * B + b) * (H * GROUP) + head) * L + i_row
    tl.store(p_lse + place, tl.where(some, m + tl.log2(total), float("-inf")), mask=m_row)
    share = (1.0 / total)[:, None]
    e = tl.arange(0, EV_MAIN)
    p_row = p_parts + place[:, None] * EV
    tl.store(p_row + e[None, :], acc * share, mask=(m_row & some)[:, None] & (e < EV)[None, :])
    if EV_TAIL > 0:
        e = EV_MAIN + tl.arange(0, EV_TAIL)
        tl.store(p_row + e[None, :], acc_tail * share, mask=(m_row & some)[:, None] & (e < EV)[None, :])


@triton.jit
def flash_combine(
    p_parts, p_part_lse, p_out, p_lse, captured, o_b, o_h, o_l, o_e, Hq, L, ROWS, SPLITS,
    EV: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_R rows from all parts and their sinks."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = row < ROWS
    row = tl.minimum(row, ROWS - 1)
    b, h, i = row // L // Hq, row // L % Hq, row % L
    e = tl.arange(0, BLOCK_EV)
    m = sink(b, h, i, captured) * LOG2E + tl.zeros([BLOCK_R], tl.float32)
    total = tl.where(m > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_R, BLOCK_EV], tl.float32)
    for first in range(0, SPLITS, BLOCK_P):
        n = first + tl.arange(0, BLOCK_P)
        at = n.to(tl.int64)[:, None] * ROWS + row[None, :]
        lse = tl.load(p_part_lse + at, mask=(n < SPLITS)[:, None], other=float("-inf"))
        m_new = tl.maximum(m, tl.max(lse, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, weight = tl.exp2(m - shift), tl.exp2(lse - shift[None, :])
        some = (lse != float("-inf"))[:, :, None] & (e < EV)[None, None, :]
        x = tl.load(p_parts + at[:, :, None] * EV + e[None, None, :], mask=some, other=0.0)
        acc = acc * alpha[:, None] + tl.sum(x * weight[:, :, None], 0)
        total = total * alpha + tl.sum(weight, 0)
        m = m_new
    some = total != 0.0  # a NaN is not no key
    total = tl.where(some, total, 1.0)
    tl.store(p_lse + row, tl.where(some, (m + tl.log2(total)) * LN2, float("-inf")), mask=m_row)
    out = acc / total[:, None] * (tl.zeros([BLOCK_R], tl.float32) + gain(b, h, i, captured))[:, None]
    at = (b * o_b + h * o_h + i * o_l)[:, None] + (e * o_e)[None, :]
    tl.store(p_out + at, out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (e < EV)[None, :])
