"""What the kernels of softmax attention share: holes of pairs and rows, tiles of operands, the steps of an inner tile.

Holes: functions of coordinates that broadcast: b a scalar; h a scalar, or along i; i and j a column and a row or the
reverse. m_ok holds where a pair exists. SCALE: the score is SCALE * s, or 0: `score` says. Scores are natural logits;
kernels count in powers of two.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691, section 3; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import triton
import triton.language as tl

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
def score_slope(s, b, h, i, j, m_ok, captured):
    """d score / d s."""
    return 1.0


@triton.jit
def sink(b, h, i, captured):
    """The logit of a row's sink, float32; -inf: none."""
    return float("-inf")


@triton.jit
def gain(b, h, i, captured):
    """A factor of a row's output, float32."""
    return 1.0


@triton.jit
def tile(p, row, stride, column_stride, m_row, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
         MASKED: tl.constexpr):  # fmt: skip
    """Columns FIRST .. FIRST + BLOCK of rows; 0 beyond WIDTH and, if MASKED, where m_row fails."""
    column = FIRST + tl.arange(0, BLOCK)
    at = p + row[:, None] * stride + column[None, :] * column_stride
    m = (column < WIDTH)[None, :] if FIRST + BLOCK > WIDTH else tl.full([1, 1], 1, tl.int1)
    return tl.load(at, mask=m & m_row[:, None] if MASKED else m, other=0.0)


@triton.jit
def put(p, x, row, stride, column_stride, m_row, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write columns FIRST .. FIRST + BLOCK of rows."""
    column = FIRST + tl.arange(0, BLOCK)
    at = p + row[:, None] * stride + column[None, :] * column_stride
    tl.store(at, x.to(p.dtype.element_ty), mask=m_row[:, None] & (column < WIDTH)[None, :])


@triton.jit
def logits(s, b, h, i, j, m_ok, captured, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """Scores in units of s if SCALE, else natural; -inf where a pair is not kept."""
    if SCALE == 0.0:
        x = score(s, b, h, i, j, m_ok, captured)
    else:
        x = s
    if MASKED:
        x = tl.where(m_ok & keep(b, h, i, j, m_ok, captured), x, float("-inf"))
    return x


@triton.jit
def slopes(d_score, s, b, h, i, j, m_ok, captured, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """d loss / d s but for the factor SCALE, which is left to the end."""
    if SCALE == 0.0:
        d_score = d_score * score_slope(s, b, h, i, j, m_ok, captured)
        if MASKED:  # a slope may be anything where the pair does not exist
            d_score = tl.where(m_ok & keep(b, h, i, j, m_ok, captured), d_score, 0.0)
    return d_score


@triton.jit
def product(x, x_tail, p, row, stride, column_stride, m_row, MAIN: tl.constexpr, TAIL: tl.constexpr,
            WIDTH: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x y^T for the rows y of a tile, and y as KIND in its two parts; without a TAIL the second is the first."""
    y = tile(p, row, stride, column_stride, m_row, 0, MAIN, WIDTH, MASKED).to(KIND)
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if TAIL > 0:
        y_tail = tile(p, row, stride, column_stride, m_row, MAIN, TAIL, WIDTH, MASKED).to(KIND)
        s = tl.dot(x_tail, tl.trans(y_tail), s, input_precision=PRECISION)
    else:
        y_tail = y
    return s, y, y_tail


@triton.jit
def soften(x, m, total, FACTOR: tl.constexpr, SURE: tl.constexpr):
    """Weights of more keys, the factor of earlier sums, the running maximum and sum. SURE: some key is kept."""
    m_new = tl.maximum(m, tl.max(x, 1) * FACTOR)
    if SURE:
        shift = m_new
    else:  # no key so far: -inf - -inf is no weight
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(x * FACTOR - shift[:, None])
    alpha = tl.exp2(m - shift)
    return p, alpha, m_new, total * alpha + tl.sum(p, 1)


@triton.jit
def weighted(acc, acc_tail, p, alpha, p_v, row, stride, column_stride, m_row, MAIN: tl.constexpr, TAIL: tl.constexpr,
             WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """alpha acc + p v for the rows v of a tile, in its two parts."""
    v = tile(p_v, row, stride, column_stride, m_row, 0, MAIN, WIDTH, MASKED).to(p.dtype)
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
    if TAIL > 0:
        v_tail = tile(p_v, row, stride, column_stride, m_row, MAIN, TAIL, WIDTH, MASKED).to(p.dtype)
        acc_tail = tl.dot(p, v_tail, acc_tail * alpha[:, None], input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def settled(m, total):
    """The log-sum-exp in powers of two, -inf without keys, and what sums are multiplied by in the end."""
    some = total != 0.0  # a NaN is not no key
    total = tl.where(some, total, 1.0)
    return tl.where(some, m + tl.log2(total), float("-inf")), tl.where(some, 1.0 / total, 0.0)


@triton.jit
def weights(x, lse, b, h, i, j, m_ok, captured, FACTOR: tl.constexpr, MASKED: tl.constexpr):
    """Weights of pairs from their scores x and their rows' lse, which broadcasts to x."""
    p = tl.exp2(x * FACTOR - lse)
    if MASKED:
        p = tl.where(m_ok & keep(b, h, i, j, m_ok, captured), p, 0.0)
    return p
