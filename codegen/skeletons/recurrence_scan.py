"""Recurrences element by element: blocks of tokens scanned side by side, the state carried from block to block.

    s_t = d_t s_{t-1} + w_t k_t v_t,   out_t = scale sum_k q_t s_t       BEFORE: q_t (s_{t-1} + bonus w_t k_t v_t)
    a_t = scale q_t do_t + d_{t+1} a_{t+1}                               what the loss gains with s_t
    dv = w sum_k a k,  dw = v sum_k a k,  dk = a w v,  d(log d) = a d_t s_{t-1},  dq = scale do_t s_t

Shapes: query, key (B, heads, L, K), value (B, H, L, V), decay by its KIND, beta (B, H, L), any strides; rates, bonus
(H, K); initial (B, H, K, V), final likewise, contiguous float32. A channel is a column of a head: H V of them.
states (B, blocks, K, H V) float32: the state that each block of tokens begins with. Gradients of value, decay and beta
(B, H, L, V), of a decay by channel (B, H, L, V, K), any strides: sums over V are taken afterwards; of query and key
(B, L, P, K) float32, P one for each block of channels where it shares a head of keys (SHARED), else for each channel;
of rates, of a decay by head and of bonus (B, K, H V) float32; of initial as initial, contiguous.

BEFORE scans the update one token late: position p holds the update of token p - 1 and the read of token p, so that
there are L + 1 positions and one way to compute both.

Why it is fast: every operand is read once for all of a block's channels, and of the states one in BLOCK_T reaches
memory; a tile is tokens by K by channels, so that channels fill the lanes, rows of the state the warps, and tokens
the registers of one thread: the scan is a chain of multiply-adds without shuffles; what comes before an element is a
part of its scan, so that the backward computes each exponential once; query and key that channels share are loaded
once for all of them, and their gradients are summed over a block of channels before they are written, no atomics.

Source: Gu and Dao 2023, arXiv:2312.00752, section 3.3.2 (recomputation, fused scan); Blelloch 1990 (prefix sums).
"""

import triton
import triton.language as tl

from attnc.codegen.skeletons.recurrence_step import CHANNEL, HEAD, NONE, STATE

HOLES = ()


@triton.jit
def follow(d, u, d_next, u_next):
    """Two affine maps of the state, one after the other."""
    return d * d_next, u * d_next + u_next


@triton.jit
def follow_apart(d, u, d_in, u_in, d_next, u_next, d_in_next, u_in_next):
    """`follow`, and what the last map is applied to: after (1, 0) what came in, after (1, x) x and what came in."""
    return d * d_next, u * d_next + u_next, d_in_next * d, d_in_next * u + u_in_next


@triton.jit
def rows(p, far, head, t, m_t, c, m_c, m_n, x_h, x_l, x_e, SHARED: tl.constexpr):
    """Rows of query or key, (tokens, K, channels or 1); one head for all channels where they share it."""
    at = t[:, None] * x_l + c[None, :] * x_e
    m = m_t[:, None] & m_c[None, :]
    if SHARED:  # loaded in two dimensions, so that the layout of the tile does not follow from it
        x = tl.load(p + far + head * x_h + at, mask=m, other=0.0)[:, :, None]
    else:
        place = far + at[:, :, None] + head[None, None, :] * x_h
        x = tl.load(p + place, mask=m[:, :, None] & m_n[None, None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def put_rows(p, x, first, t, m_t, c, m_c, n, m_n, part, width, parts, K: tl.constexpr, SHARED: tl.constexpr):
    """Gradients of such rows, summed over the channels where they share one; first: tokens of earlier sequences."""
    row = first + t[:, None]
    m = m_t[:, None] & m_c[None, :]
    if SHARED:
        tl.store(p + (row * parts + part) * K + c[None, :], tl.sum(x, 2), mask=m)
    else:
        at = (row * width * K + c[None, :])[:, :, None] + n[None, None, :] * K
        tl.store(p + at, x, mask=m[:, :, None] & m_n[None, None, :])


@triton.jit
def starts(p_segments, batch, s, m_s, L):
    """Whether a document starts at token s behind another one."""
    row = p_segments + batch * L
    inner = m_s & (s > 0)
    return tl.load(row + s, mask=inner, other=0) != tl.load(row + s - 1, mask=inner, other=0)


@triton.jit
def factors(
    p_decay, p_rates, p_segments, batch, s, m_s, h, m_n, c, m_c, g_b, g_h, g_l, g_e, L,
    KIND: tl.constexpr, FACTORS: tl.constexpr, PACKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What is left of the state at tokens s, (tokens, K, channels); all of it where there is no token."""
    m = m_s[:, None] & m_n[None, :]
    whole = m[:, None, :] & m_c[None, :, None]
    none: tl.constexpr = 1.0 if FACTORS else 0.0
    far = batch * g_b
    at = h[None, :] * g_h + s[:, None] * g_l
    if KIND == CHANNEL:
        g = tl.load(p_decay + far + at[:, None, :] + c[None, :, None] * g_e, mask=whole, other=none).to(tl.float32)
    elif KIND == STATE:
        rate = tl.load(p_rates + h[None, :] * K + c[:, None], mask=m_n[None, :] & m_c[:, None], other=0.0)
        g = tl.load(p_decay + far + at, mask=m, other=none).to(tl.float32)[:, None, :] * rate.to(tl.float32)[None]
    elif KIND == NONE:
        g = tl.where(whole, none, none)
    else:
        g = tl.load(p_decay + far + at, mask=m, other=none).to(tl.float32)[:, None, :] + tl.where(whole, 0.0, 0.0)
    if FACTORS:
        d = tl.where(whole, g, 1.0)
    else:
        d = tl.exp(g)
    if PACKED:
        d = tl.where(starts(p_segments, batch, s, m_s, L)[:, None, None], 0.0, d)
    return d


@triton.jit
def weighted(p_v, p_beta, batch, s, m, h, e, v_b, v_h, v_l, v_e, w_b, w_h, w_l, GATED: tl.constexpr):
    """Values and gates of tokens s, (tokens, channels)."""
    at = batch * v_b + h[None, :] * v_h + s[:, None] * v_l + e[None, :] * v_e
    v = tl.load(p_v + at, mask=m, other=0.0).to(tl.float32)
    if GATED:
        w = tl.load(p_beta + batch * w_b + h[None, :] * w_h + s[:, None] * w_l, mask=m, other=0.0).to(tl.float32)
    else:
        w = tl.where(m, 1.0, 0.0)
    return v, w


@triton.jit
def recurrence_scan(
    p_q, p_k, p_v, p_decay, p_rates, p_beta, p_bonus, p_initial, p_segments, p_out, p_final, p_states,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, g_b, g_h, g_l, g_e, w_b, w_h, w_l,
    o_b, o_h, o_l, o_e, i_b, i_h, i_k, i_v,
    H, L, GROUP: tl.constexpr, SCALE: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr, KIND: tl.constexpr,
    FACTORS: tl.constexpr, GATED: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr, PACKED: tl.constexpr,
    INITIAL: tl.constexpr, SHARED: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_H channels of one sequence, all tokens. READ: write outputs; KEEP: write the states of the blocks."""
    LATE: tl.constexpr = 1 if BEFORE else 0
    width = H * V
    parts = tl.cdiv(width, BLOCK_H)
    part, batch = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    n, c, i = part * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    m_n, m_c = n < width, c < K
    h, e = (n // V).to(tl.int64), n % V
    if SHARED:
        head = (part * BLOCK_H // V // GROUP).to(tl.int64)
    else:
        head = h // GROUP
    m_state = m_n[None, :] & m_c[:, None]
    S = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    if INITIAL:
        start = p_initial + batch * i_b + h[None, :] * i_h + c[:, None] * i_k + e[None, :] * i_v
        S = tl.load(start, mask=m_state, other=0.0).to(tl.float32)
    if BONUS:
        bonus = tl.load(p_bonus + h[None, :] * K + c[:, None], mask=m_state, other=0.0).to(tl.float32)
    blocks = tl.cdiv(L + LATE, BLOCK_T)
    for j in range(blocks):
        t = (batch - batch) + j * BLOCK_T + i  # the token read, 64 bits
        s = t - LATE  # the token written
        m_t, m_s = t < L, (s >= 0) & (s < L)
        if KEEP:
            place = ((batch * blocks + j) * K + c[:, None]) * width + n[None, :]
            tl.store(p_states + place, S, mask=m_state)
        d = factors(p_decay, p_rates, p_segments, batch, s, m_s, h, m_n, c, m_c, g_b, g_h, g_l, g_e, L,
                    KIND, FACTORS, PACKED, K)  # fmt: skip
        v, w = weighted(p_v, p_beta, batch, s, m_s[:, None] & m_n[None, :], h, e,
                        v_b, v_h, v_l, v_e, w_b, w_h, w_l, GATED)  # fmt: skip
        u = (v * w)[:, None, :]
        if KEY:
            u = u * rows(p_k, batch * k_b, head, s, m_s, c, m_c, m_n, k_h, k_l, k_e, SHARED)
        else:
            u = tl.where(m_c[None, :, None], u, 0.0)
        f, x = tl.associative_scan((d, u), 0, follow)
        x += f * S[None]
        S = tl.sum(tl.where((i == BLOCK_T - 1)[:, None, None], x, 0.0), 0)
        if READ:
            m_o = m_t[:, None] & m_n[None, :]
            if BEFORE and PACKED:
                x = tl.where(starts(p_segments, batch, t, m_t, L)[:, None, None], 0.0, x)
            if BONUS:
                v, w = weighted(p_v, p_beta, batch, t, m_o, h, e, v_b, v_h, v_l, v_e, w_b, w_h, w_l, GATED)
                own = bonus[None] * (v * w)[:, None, :]
                if KEY:
                    own = own * rows(p_k, batch * k_b, head, t, m_t, c, m_c, m_n, k_h, k_l, k_e, SHARED)
                x += own
            if QUERY:
                x = x * rows(p_q, batch * q_b, head, t, m_t, c, m_c, m_n, q_h, q_l, q_e, SHARED)
            o = tl.sum(x, 1) * SCALE
            at = batch * o_b + h[None, :] * o_h + t[:, None] * o_l + e[None, :] * o_e
            tl.store(p_out + at, o.to(p_out.dtype.element_ty), mask=m_o)
    if READ:
        last = ((batch * H + h[None, :]) * K + c[:, None]) * V + e[None, :]
        tl.store(p_final + last, S, mask=m_state)


@triton.jit
def recurrence_scan_backward(
    p_q, p_k, p_v, p_decay, p_rates, p_beta, p_bonus, p_segments, p_states, p_do, p_dfinal,
    p_dq, p_dk, p_dv, p_dg, p_drates, p_dw, p_dbonus, p_dinitial,
    q_b, q_h, q_l, q_e, k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, g_b, g_h, g_l, g_e, w_b, w_h, w_l, o_b, o_h, o_l, o_e,
    dv_b, dv_h, dv_l, dv_e, dg_b, dg_h, dg_l, dg_e, dg_k, dw_b, dw_h, dw_l, dw_e,
    H, L, GROUP: tl.constexpr, SCALE: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr, KIND: tl.constexpr,
    FACTORS: tl.constexpr, GATED: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr, PACKED: tl.constexpr,
    INITIAL: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_H channels of one sequence, from the last block of tokens to the first."""
    LATE: tl.constexpr = 1 if BEFORE else 0
    width = H * V
    parts = tl.cdiv(width, BLOCK_H)
    part, batch = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    n, c, i = part * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    m_n, m_c = n < width, c < K
    h, e = (n // V).to(tl.int64), n % V
    if SHARED:
        head = (part * BLOCK_H // V // GROUP).to(tl.int64)
    else:
        head = h // GROUP
    m_state = m_n[None, :] & m_c[:, None]
    last = ((batch * H + h[None, :]) * K + c[:, None]) * V + e[None, :]
    A = tl.load(p_dfinal + last, mask=m_state, other=0.0)  # what comes back from the tokens behind
    once = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)  # the gradient of what all tokens share
    d_bonus = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    if BONUS:
        bonus = tl.load(p_bonus + h[None, :] * K + c[:, None], mask=m_state, other=0.0).to(tl.float32)
    if KIND == STATE:
        rate = tl.load(p_rates + h[None, :] * K + c[:, None], mask=m_state, other=0.0).to(tl.float32)
    blocks = tl.cdiv(L + LATE, BLOCK_T)
    for back in range(blocks):
        j = blocks - 1 - back
        t = (batch - batch) + j * BLOCK_T + i
        s = t - LATE
        m_t, m_s = t < L, (s >= 0) & (s < L)
        m_to, m_so = m_t[:, None] & m_n[None, :], m_s[:, None] & m_n[None, :]
        C = tl.load(p_states + ((batch * blocks + j) * K + c[:, None]) * width + n[None, :], mask=m_state, other=0.0)
        d = factors(p_decay, p_rates, p_segments, batch, s, m_s, h, m_n, c, m_c, g_b, g_h, g_l, g_e, L,
                    KIND, FACTORS, PACKED, K)  # fmt: skip
        v, w = weighted(p_v, p_beta, batch, s, m_so, h, e, v_b, v_h, v_l, v_e, w_b, w_h, w_l, GATED)
        if KEY:
            k = rows(p_k, batch * k_b, head, s, m_s, c, m_c, m_n, k_h, k_l, k_e, SHARED)
        else:
            k = tl.where((m_s[:, None] & m_c[None, :])[:, :, None], 1.0, 0.0)
        u = (v * w)[:, None, :] * k
        _, _, f_in, x_in = tl.associative_scan((d, u, tl.full(d.shape, 1.0, tl.float32), d * 0.0), 0, follow_apart)
        P = f_in * C[None] + x_in  # the state before each update
        do = tl.load(p_do + batch * o_b + h[None, :] * o_h + t[:, None] * o_l + e[None, :] * o_e, mask=m_to, other=0.0)
        do = do.to(tl.float32)[:, None, :] * SCALE
        seen = do * 1.0
        if BEFORE and PACKED:
            seen = tl.where(starts(p_segments, batch, t, m_t, L)[:, None, None], 0.0, seen)
        x = tl.where(m_c[None, :, None], seen, 0.0)
        if QUERY:
            dq = seen * (d * P + u)
            if BONUS:
                v_t, w_t = weighted(p_v, p_beta, batch, t, m_to, h, e, v_b, v_h, v_l, v_e, w_b, w_h, w_l, GATED)
                own = (v_t * w_t)[:, None, :] * bonus[None]
                if KEY:
                    own = own * rows(p_k, batch * k_b, head, t, m_t, c, m_c, m_n, k_h, k_l, k_e, SHARED)
                dq += do * own
            put_rows(p_dq, dq, batch * L, t, m_t, c, m_c, n, m_n, part, width, parts, K, SHARED)
            x = x * rows(p_q, batch * q_b, head, t, m_t, c, m_c, m_n, q_h, q_l, q_e, SHARED)
        _, _, f_in, x_in = tl.associative_scan(
            (d, d * x, tl.full(d.shape, 1.0, tl.float32), x), 0, follow_apart, reverse=True
        )
        a = f_in * A[None] + x_in  # what the loss gains with each state
        A = tl.sum(tl.where((i == 0)[:, None, None], d * a, 0.0), 0)
        g = a * P
        if not FACTORS:
            g = g * d
        elif PACKED:
            g = tl.where(starts(p_segments, batch, s, m_s, L)[:, None, None], 0.0, g)
        if KIND == HEAD:
            once += tl.sum(tl.where(m_s[:, None, None], g, 0.0), 0)
        elif KIND != NONE:
            at = p_dg + batch * dg_b + h[None, :] * dg_h + s[:, None] * dg_l + e[None, :] * dg_e
            if KIND == CHANNEL:
                tl.store(at[:, None, :] + c[None, :, None] * dg_k, g.to(p_dg.dtype.element_ty),
                         mask=m_so[:, None, :] & m_c[None, :, None])  # fmt: skip
            else:
                if KIND == STATE:
                    step = tl.load(p_decay + batch * g_b + h[None, :] * g_h + s[:, None] * g_l, mask=m_so, other=0.0)
                    once += tl.sum(g * step.to(tl.float32)[:, None, :], 0)
                    g = g * rate[None]
                tl.store(at, tl.sum(g, 1).to(p_dg.dtype.element_ty), mask=m_so)
        if BONUS:
            at = batch * o_b + h[None, :] * o_h + s[:, None] * o_l + e[None, :] * o_e
            own = tl.load(p_do + at, mask=m_so, other=0.0)
            own = own.to(tl.float32)[:, None, :] * tl.where(m_c[None, :, None], SCALE, 0.0)
            if QUERY:
                own = own * rows(p_q, batch * q_b, head, s, m_s, c, m_c, m_n, q_h, q_l, q_e, SHARED)
            d_bonus += tl.sum(own * u, 0)
            a += own * bonus[None]
        if KEY:
            dk = a * (v * w)[:, None, :]
            put_rows(p_dk, dk, batch * L, s, m_s, c, m_c, n, m_n, part, width, parts, K, SHARED)
        a = tl.sum(a * k, 1)
        at = batch * dv_b + h[None, :] * dv_h + s[:, None] * dv_l + e[None, :] * dv_e
        tl.store(p_dv + at, (a * w).to(p_dv.dtype.element_ty), mask=m_so)
        if GATED:
            at = batch * dw_b + h[None, :] * dw_h + s[:, None] * dw_l + e[None, :] * dw_e
            tl.store(p_dw + at, (a * v).to(p_dw.dtype.element_ty), mask=m_so)
    place = (batch * K + c[:, None]) * width + n[None, :]
    if KIND == HEAD or KIND == STATE:  # noqa: SIM109 (Triton has no `in`)
        tl.store(p_drates + place, once, mask=m_state)
    if BONUS:
        tl.store(p_dbonus + place, d_bonus, mask=m_state)
    if INITIAL:
        tl.store(p_dinitial + last, A, mask=m_state)
