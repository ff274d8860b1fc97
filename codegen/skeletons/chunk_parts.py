"""What the kernels of chunked recurrences share: tiles, places, sums of decays, pairs of tokens, the inverse.

A chunk has BLOCK_C tokens; columns of keys and of values come in tiles. G is the inclusive sum of the decays (natural
logarithms, none below LEAST, whose exponential is 0 in float32) from the chunk's start. Whatever is exponentiated is at
most 0. DECAY says where G comes from: NONE; HEAD, a rate times a position; TOKEN, memory; CHANNEL, memory, by column.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-104.0)
NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
TOKEN = tl.constexpr(2)
CHANNEL = tl.constexpr(3)
BLOCK_I = tl.constexpr(16)


@triton.jit
def place(at, count, heads, GROUP: tl.constexpr):
    """Chunk, batch, head: heads of a group side by side, which share keys, then chunks, then groups."""
    member, rest = at % GROUP, at // GROUP
    n, rest = rest % count, rest // count
    groups = heads // GROUP
    return n, (rest // groups).to(tl.int64), (rest % groups * GROUP + member).to(tl.int64)


@triton.jit
def inside(column, m_row, WIDTH: tl.constexpr):
    """Where a tile of rows and columns exists."""
    if ((column.shape[0] - 1) & WIDTH) == 0:  # a multiple of the tile
        m = m_row[:, None]
    else:
        m = m_row[:, None] & (column < WIDTH)[None, :]
    return m


@triton.jit
def tile(p, row, stride, column, column_stride, m_row, WIDTH: tl.constexpr):
    """Rows by columns; 0 where m_row fails and from WIDTH on."""
    at = p + row[:, None] * stride + column[None, :] * column_stride
    return tl.load(at, mask=inside(column, m_row, WIDTH), other=0.0)


@triton.jit
def put(p, x, row, stride, column, column_stride, m_row, WIDTH: tl.constexpr):
    """Write rows by columns."""
    at = p + row[:, None] * stride + column[None, :] * column_stride
    tl.store(at, x.to(p.dtype.element_ty), mask=inside(column, m_row, WIDTH))


@triton.jit
def vector(p, row, stride, m_row):
    """One float32 number per row, 0 where m_row fails."""
    return tl.load(p + row * stride, mask=m_row, other=0.0).to(tl.float32)


@triton.jit
def decay_sums(p_sums, rate, row, m_row, DECAY: tl.constexpr):
    """G of the rows of a chunk; p_sums is at its first row."""
    if DECAY == TOKEN:
        g = tl.load(p_sums + row, mask=m_row, other=0.0)
    elif DECAY == HEAD:
        g = (row + 1).to(tl.float32) * rate
    else:
        g = row.to(tl.float32) * 0.0
    return g


@triton.jit
def earlier_sums(p_sums, rate, row, m_row, DECAY: tl.constexpr):
    """G of the row before, 0 for the first."""
    if DECAY == TOKEN:
        g = tl.load(p_sums + row - 1, mask=m_row & (row > 0), other=0.0)
    elif DECAY == HEAD:
        g = row.to(tl.float32) * rate
    else:
        g = row.to(tl.float32) * 0.0
    return g


@triton.jit
def rate_of(p_rate, h, DECAY: tl.constexpr):
    """The constant decay of a head, 0 where there is none."""
    rate = 0.0
    if DECAY == HEAD:
        rate = tl.maximum(tl.load(p_rate + h).to(tl.float32), LEAST)
    return rate


@triton.jit
def segment_before(p_segments, start):
    """The document whose state a chunk meets; p_segments is at the first token of the sequence."""
    return tl.load(p_segments + tl.maximum(start - 1, 0))


@triton.jit
def pair_decay(late, early, m_ok, DECAY: tl.constexpr):
    """exp(late_i - early_j) where m_ok holds, else 0."""
    if (DECAY == HEAD) | (DECAY == TOKEN):
        e = tl.exp(tl.where(m_ok, late[:, None] - early[None, :], float("-inf")))
    else:
        e = tl.where(m_ok, 1.0, 0.0)
    return e


@triton.jit
def diagonal_blocks(a, SIZE: tl.constexpr, CORNERS: tl.constexpr):
    """The diagonal blocks of a (C, C) as (C / SIZE, SIZE, SIZE); CORNERS: the lower left quarters of blocks of twice
    SIZE, (C / (2 SIZE), SIZE, SIZE)."""
    BLOCKS: tl.constexpr = a.shape[0] // SIZE
    block = tl.arange(0, BLOCKS)
    of_row, of_column = block[:, None, None, None], block[None, None, :, None]
    tiles = tl.reshape(a, [BLOCKS, SIZE, BLOCKS, SIZE])
    if CORNERS:
        found = tl.sum(tl.where((of_row == of_column + 1) & (of_row % 2 == 1), tiles, 0.0), 2)
        found = tl.sum(tl.reshape(found, [BLOCKS // 2, 2, SIZE, SIZE]), 1)
    else:
        found = tl.sum(tl.where(of_row == of_column, tiles, 0.0), 2)
    return found


@triton.jit
def doubled(x, corner, PRECISION: tl.constexpr):
    """Inverses of blocks of twice the size: x (2 P, s, s) on their diagonals, -x a x in their lower corners."""
    PAIRS: tl.constexpr = corner.shape[0]
    SIZE: tl.constexpr = corner.shape[1]
    side = tl.arange(0, 2)
    of_row, of_column = side[None, :, None, None, None], side[None, None, None, :, None]
    pairs = tl.reshape(x, [PAIRS, 2, SIZE, SIZE])
    first = tl.sum(tl.where((side == 0)[None, :, None, None], pairs, 0.0), 1)
    second = tl.sum(tl.where((side == 1)[None, :, None, None], pairs, 0.0), 1)
    low = tl.dot(tl.dot(second, corner, input_precision=PRECISION), first, input_precision=PRECISION)
    both = tl.where(of_row == of_column, pairs[:, :, :, None, :], 0.0)
    both -= tl.where(of_row > of_column, low[:, None, :, None, :], 0.0)
    return tl.reshape(both, [PAIRS, 2 * SIZE, 2 * SIZE])


@triton.jit
def inverse(a, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular (C, C), float32: rows of diagonal blocks of 16 by substitution, all
    blocks at once; then blocks of twice the size, whose lower corner is -x a x."""
    C: tl.constexpr = a.shape[0]
    diagonal = diagonal_blocks(a, BLOCK_I, False)
    row = tl.arange(0, BLOCK_I)
    x = tl.zeros_like(diagonal) + tl.where(row[:, None] == row[None, :], 1.0, 0.0)[None, :, :]
    for r in tl.range(1, BLOCK_I):
        m_r = (row == r)[None, :, None]
        of_row = tl.sum(tl.where(m_r, diagonal, 0.0), 1)
        x -= tl.where(m_r, tl.sum(of_row[:, :, None] * x, 1)[:, None, :], 0.0)
    if C >= 32:
        x = doubled(x, diagonal_blocks(a, 16, True), PRECISION)
    if C >= 64:
        x = doubled(x, diagonal_blocks(a, 32, True), PRECISION)
    if C >= 128:
        x = doubled(x, diagonal_blocks(a, 64, True), PRECISION)
    return tl.reshape(x, [C, C])


@triton.jit
def halves(i, j, level):
    """Where i lies in the later and j in the earlier half of the same block of 2^(level + 1) tokens."""
    return ((i >> level) % 2 == 1) & ((i >> level) == (j >> level) + 1)
