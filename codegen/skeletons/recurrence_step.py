"""Recurrences token by token: the state in registers, each token read once. For decoding, and for any rule at all.

    S <- d S + b (a^T S) + w k v^T,   out = scale q^T S

Shapes: query, key, a, b (B, heads, L, K), value (B, H, L, V), out likewise, decay by its KIND, beta (B, H, L), any
strides; rates (H, K), bonus (H, K) or, under an exponential gate, (H,); initial and final (B, H, K, V + COLUMNS), final
contiguous float32: behind V stand the sum of the keys (NORMALISED) and the running maximum (EXPONENTIAL).

Why it is fast: a decoding step reads the state once and writes it once, which is all the memory it has to move; blocks
of columns of one head are programs of their own, so that one sequence fills the device; no product is too small for a
matrix instruction, because none is used.

Source: Yang et al. 2024, arXiv:2406.06484, equation 4; Gu and Dao 2023, arXiv:2312.00752, equation 2; Beck et al. 2024,
arXiv:2405.04517, section 2.3 (running maximum).
"""

import triton
import triton.language as tl

HOLES = ()
NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
TOKEN = tl.constexpr(2)
CHANNEL = tl.constexpr(3)
STATE = tl.constexpr(4)


@triton.jit
def channels(p, at, stride, c, m_c, GIVEN: tl.constexpr):
    """One row of query, key, a or b, float32; ones where there is none."""
    if GIVEN:
        x = tl.load(p + at + c * stride, mask=m_c, other=0.0).to(tl.float32)
    else:
        x = tl.where(m_c, 1.0, 0.0)
    return x


@triton.jit
def factor(p_decay, at, stride, p_rates, h, c, m_c, K: tl.constexpr, KIND: tl.constexpr, FACTORS: tl.constexpr):
    """What is left of each row of the state; for HEAD `at` is the head's place."""
    if KIND == CHANNEL:
        g = tl.load(p_decay + at + c * stride, mask=m_c, other=0.0).to(tl.float32)
    elif KIND == STATE:
        g = tl.load(p_decay + at).to(tl.float32) * tl.load(p_rates + h * K + c, mask=m_c, other=0.0).to(tl.float32)
    elif KIND == NONE:
        g = tl.where(m_c, 0.0, 0.0)
    else:
        g = tl.load(p_decay + at).to(tl.float32) + tl.where(m_c, 0.0, 0.0)
    if FACTORS:
        d = g
    else:
        d = tl.exp(g)
    return d


@triton.jit
def recurrence_step(
    p_q, p_k, p_v, p_decay, p_rates, p_beta, p_bonus, p_initial, p_a, p_b, p_segments, p_out, p_final,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, g_b, g_h, g_l, g_e, w_b, w_h, w_l,
    a_b, a_h, a_l, a_e, b_b, b_h, b_l, b_e, o_b, o_h, o_l, o_e, i_b, i_h, i_k, i_v,
    H, L, GROUP: tl.constexpr, GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, NORMED: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr, KIND: tl.constexpr,
    FACTORS: tl.constexpr, DELTA: tl.constexpr, RANK: tl.constexpr, WRITE: tl.constexpr, EXPONENTIAL: tl.constexpr,
    BEFORE: tl.constexpr, BONUS: tl.constexpr, NORMALISED: tl.constexpr, MAX1: tl.constexpr, PACKED: tl.constexpr,
    INITIAL: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, BLOCK_V columns of its state."""
    slices: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    at = tl.program_id(0)
    part, row = at % slices, at // slices
    batch, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    c, e = tl.arange(0, BLOCK_K), part * BLOCK_V + tl.arange(0, BLOCK_V)
    m_c, m_e = c < K, e < V
    m_s = m_c[:, None] & m_e[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    n = tl.zeros([BLOCK_K], tl.float32)
    floor = 0.0 if MAX1 else -1e38  # the running maximum of nothing
    m = tl.zeros([BLOCK_K], tl.float32) + floor  # the same number in all places
    if INITIAL:
        start = p_initial + batch * i_b + h * i_h
        S = tl.load(start + c[:, None] * i_k + e[None, :] * i_v, mask=m_s, other=0.0).to(tl.float32)
        if NORMALISED:
            n = tl.load(start + c * i_k + V * i_v, mask=m_c, other=0.0).to(tl.float32)
        if EXPONENTIAL:
            m = tl.zeros([BLOCK_K], tl.float32) + tl.load(start + (V + COLUMNS - 1) * i_v).to(tl.float32)
    bonus = tl.zeros([BLOCK_K], tl.float32)
    if BONUS:
        if EXPONENTIAL:
            bonus += tl.load(p_bonus + h).to(tl.float32)
        else:
            bonus = tl.load(p_bonus + h * K + c, mask=m_c, other=0.0).to(tl.float32)
    zero = batch - batch
    for t in range(L):
        far = zero + t  # 64 bits
        q = channels(p_q, batch * q_b + h // GROUP * q_h + far * q_l, q_e, c, m_c, QUERY)
        k = channels(p_k, batch * k_b + h // GROUP * k_h + far * k_l, k_e, c, m_c, KEY)
        v = tl.load(p_v + batch * v_b + h * v_h + far * v_l + e * v_e, mask=m_e, other=0.0).to(tl.float32)
        if NORMED:
            q = q / tl.sqrt(tl.sum(q * q) + NORM)
            k = k / tl.sqrt(tl.sum(k * k) + NORM)
        q = q * SCALE
        g_at = h * g_h if KIND == HEAD else batch * g_b + h * g_h + far * g_l
        d = factor(p_decay, g_at, g_e, p_rates, h, c, m_c, K, KIND, FACTORS)
        w = tl.zeros([BLOCK_K], tl.float32) + 1.0
        if WRITE or EXPONENTIAL:
            w = tl.zeros([BLOCK_K], tl.float32) + tl.load(p_beta + batch * w_b + h * w_h + far * w_l)
        stays = 1.0
        if PACKED:
            number = tl.load(p_segments + batch * L + t)
            stays = tl.where(number == tl.load(p_segments + batch * L + tl.maximum(t - 1, 0)), 1.0, 0.0)
            m = tl.where(stays > 0, m, floor)
            S, n = tl.where(stays > 0, S, 0.0), tl.where(stays > 0, n, 0.0)
        own, top = w, m
        if EXPONENTIAL:  # the log of the decay is wanted, and the gate is a logarithm
            f = tl.log(d)
            top = tl.maximum(f + m, w)
            gate, w = w, tl.exp(w - top)
            d = tl.exp(f + m - top)
            own = gate + bonus
        if BEFORE:
            if EXPONENTIAL:
                high = tl.maximum(m, own)
                kept, new = tl.exp(m - high), tl.exp(own - high)
                read, sums = S * kept[:, None] + (k * new)[:, None] * v[None, :], n * kept + k * new
                lift = high
            else:
                read, sums, lift = S + (bonus * w * k)[:, None] * v[None, :], n, m
        x = tl.zeros([BLOCK_V], tl.float32)
        if RANK:
            a = channels(p_a, batch * a_b + h // GROUP_A * a_h + far * a_l, a_e, c, m_c, True)
            x = tl.sum(a[:, None] * S, 0)
        S = S * d[:, None]
        if DELTA:
            v = v - tl.sum(k[:, None] * S, 0)
        S = S + (w * k)[:, None] * v[None, :]
        if RANK:
            b = channels(p_b, batch * b_b + h // GROUP_B * b_h + far * b_l, b_e, c, m_c, True)
            S = S + b[:, None] * x[None, :]
        n, m = n * d + w * k, top
        if not BEFORE:
            read, sums, lift = S, n, m
        o = tl.sum(q[:, None] * read, 0)
        if NORMALISED:
            below = tl.sum(q * sums)
            if MAX1:
                below = tl.maximum(tl.abs(below), tl.exp(-tl.max(lift)))
            o = o / (below + EPS)
        tl.store(p_out + batch * o_b + h * o_h + far * o_l + e * o_e, o.to(p_out.dtype.element_ty), mask=m_e)
    width: tl.constexpr = V + COLUMNS
    last = p_final + (batch * H + h) * K * width + c * width
    tl.store(last[:, None] + e[None, :], S, mask=m_s)
    if NORMALISED:
        tl.store(last + V, n, mask=m_c & (part == 0))
    if EXPONENTIAL:
        tl.store(last + (width - 1), m, mask=m_c & (part == 0))
