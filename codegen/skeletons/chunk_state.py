"""Recurrences in chunks: the state from chunk to chunk, what it holds when each begins, and the corrected values.

    v'_i = T beta (v - exp(G) k S)                                      SOLVE DELTA
    x_i = T (a exp(G before) S + A_ak v)                                SOLVE RANK
    S <- exp(G_last) S + (w k exp(G_last - G))^T v' + (b exp(G_last - G))^T x

Shapes: key, a, b (B, heads, L, K), value (B, H, L, V), each with any strides; states (B, H, N, K, V) at the N chunks'
starts, T and A_ak (B, H, L, BLOCK_C), corrected (B, H, L, V), v' or x: contiguous, of the type of products; initial and
final (B, H, K, V and columns), final contiguous float32. NORMALISED: sums of keys (B, H, N, K), float32, go the same
way from column V of the states.

Why it is fast: the state never leaves the registers (K by BLOCK_V, in tiles of BLOCK_K rows); W = T beta k exp(G) and
U = T beta v are never written or read, one product more per chunk takes their place; keys are loaded once a chunk for
both products; programs of one head run side by side, so that keys and T come from the cache for all but one of them.

Source: Yang et al. 2024, arXiv:2406.06484, section 3; Yang et al. 2024, arXiv:2412.06464, section 3.3.
"""

import triton
import triton.language as tl

from attnc.codegen.skeletons.chunk_parts import (
    CHANNEL,
    HEAD,
    TOKEN,
    decay_sums,
    earlier_sums,
    put,
    rate_of,
    tile,
    vector,
)

HOLES = ()
DELTA = tl.constexpr(1)
RANK = tl.constexpr(2)


@triton.jit
def read_state(S, p_x, p_sums, row, x_l, x_e, m_row, EARLIER: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
               DECAY: tl.constexpr, MID: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows times the state, but for decays by token; the rows as they were loaded."""
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([row.shape[0], S[0].shape[1]], tl.float32)
    loaded = ()  # type: tuple
    for t in tl.static_range(TILES):
        column = t * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tile(p_x, row, x_l, column, x_e, m_row, K)
        loaded = loaded + (x,)
        if DECAY == CHANNEL:
            before = m_row & (row > 0) if EARLIER else m_row
            g = tile(p_sums - K if EARLIER else p_sums, row, K, column, 1, before, K)
            x = x * tl.exp(g)
        acc = tl.dot(x.to(MID), S[t].to(MID), acc, input_precision=PRECISION)
    return acc, loaded


@triton.jit
def weights(p_sums, p_segments, p_norms, rate, before, row, last, m_row, start, SOLVE: tl.constexpr,
            DECAY: tl.constexpr, NORMED: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Factors of tokens, by what is the same for all channels: on writing k and b, on reading the state that came in;
    factor of the state; the document at the end."""
    total = 1.0
    leave = tl.where(m_row, 1.0, 0.0)
    enter = leave
    if (DECAY == TOKEN) | (DECAY == HEAD):
        g = decay_sums(p_sums, rate, row, m_row, DECAY)
        g_last = tl.load(p_sums + last) if DECAY == TOKEN else (last + 1) * rate
        total = tl.exp(g_last)
        leave *= tl.exp(tl.where(m_row, g_last - g, 0.0))
        enter *= tl.exp(earlier_sums(p_sums, rate, row, m_row, DECAY) if SOLVE == RANK else g)
    if PACKED:
        segment = tl.load(p_segments + start + row, mask=m_row, other=-1)
        end = tl.load(p_segments + start + last)
        leave = tl.where(segment == end, leave, 0.0)
        enter = tl.where(segment == before, enter, 0.0)
        total = tl.where(end == before, total, 0.0)
        before = end
    write = leave
    if NORMED:
        norm = vector(p_norms + start, row, 1, m_row)
        write *= norm
        if SOLVE == DELTA:
            enter *= norm
    return write, leave, enter, total, before


@triton.jit
def chunk_state(
    p_k, p_v, p_a, p_b, p_beta, p_sums, p_rate, p_norms, p_segments, p_inverse, p_keys, p_initial,
    p_states, p_final, p_corrected, p_normalisers,
    k_b, k_h, k_l, k_e, v_b, v_h, v_l, v_e, a_b, a_h, a_l, a_e, b_b, b_h, b_l, b_e, beta_b, beta_h, beta_l,
    i_b, i_h, i_l, i_e, H, L,
    GROUP: tl.constexpr, GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, DECAY: tl.constexpr, SOLVE: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr,
    PACKED: tl.constexpr, NORMALISED: tl.constexpr, INITIAL: tl.constexpr, MID: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The states of BLOCK_V columns of one head, chunk after chunk."""
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = V + COLUMNS
    parts: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    at = tl.program_id(0)
    part, head = at % parts, (at // parts).to(tl.int64)
    b, h = head // H, head % H
    count = tl.cdiv(L, BLOCK_C)
    row, channel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    value = part * BLOCK_V + tl.arange(0, BLOCK_V)
    rate = rate_of(p_rate, h, DECAY)
    p_k += b * k_b + h // GROUP * k_h
    p_v += b * v_b + h * v_h
    if SOLVE == RANK:
        p_a += b * a_b + h // GROUP_A * a_h
        p_b += b * b_b + h // GROUP_B * b_h
    if GATED:
        p_beta += b * beta_b + h * beta_h
    before = 0  # the document whose state comes in
    if PACKED:
        p_segments += b * L
        before = tl.load(p_segments)
    if NORMED:
        p_norms += (b * (H // GROUP) + h // GROUP) * L
    S, sums = (), ()  # type: tuple, tuple
    for t in tl.static_range(TILES):
        k_row = t * BLOCK_K + channel
        if INITIAL:
            p_i = p_initial + b * i_b + h * i_h
            S = S + (tile(p_i, k_row, i_l, value, i_e, k_row < K, V).to(tl.float32),)
            sums = sums + (vector(p_i + V * i_e, k_row, i_l, k_row < (K if NORMALISED else 0)),)
        else:
            S = S + (tl.zeros([BLOCK_K, BLOCK_V], tl.float32),)
            sums = sums + (tl.zeros([BLOCK_K], tl.float32),)

    for n in tl.range(0, count):
        start = tl.cast(n, tl.int64) * BLOCK_C
        m_row = row < L - start
        last = tl.minimum(BLOCK_C, L - start).to(tl.int32) - 1
        token = head * L + start
        p_states_n = p_states + (head * count + n) * K * V
        for t in tl.static_range(TILES):
            k_row = t * BLOCK_K + channel
            put(p_states_n, S[t], k_row, V, value, 1, k_row < K, V)
            if NORMALISED and part == 0:
                tl.store(p_normalisers + (head * count + n) * K + k_row, sums[t], mask=k_row < K)

        p_sums_n = p_sums
        if DECAY == CHANNEL:
            p_sums_n += token * K
        if DECAY == TOKEN:
            p_sums_n += token
        write, leave, enter, total, before = weights(p_sums_n, p_segments, p_norms, rate, before, row, last, m_row,
                                                     start, SOLVE, DECAY, NORMED, PACKED)  # fmt: skip
        if GATED:
            beta = vector(p_beta + start * beta_l, row, beta_l, m_row)
            if SOLVE != DELTA:
                write *= beta

        p_kn = p_k + start * k_l
        v = tile(p_v + start * v_l, row, v_l, value, v_e, m_row, V)
        if SOLVE == DELTA:
            x, keys = read_state(S, p_kn, p_sums_n, row, k_l, k_e, m_row, False, K, BLOCK_K, DECAY, MID, PRECISION)
            x = v - x * enter[:, None]
            if GATED:
                x *= beta[:, None]
        if SOLVE == RANK:
            x, _rows = read_state(S, p_a + start * a_l, p_sums_n, row, a_l, a_e, m_row, True, K, BLOCK_K, DECAY, MID,
                                  PRECISION)  # fmt: skip
            within = tile(p_keys + token * BLOCK_C, row, BLOCK_C, row, 1, m_row, BLOCK_C)
            x = tl.dot(within, v.to(MID), x * enter[:, None], input_precision=PRECISION)
        if SOLVE != 0:
            solved = tile(p_inverse + token * BLOCK_C, row, BLOCK_C, row, 1, m_row, BLOCK_C)
            x = tl.dot(solved, x.to(MID), input_precision=PRECISION)
            put(p_corrected + token * V, x, row, V, value, 1, m_row, V)
        source = x if SOLVE == DELTA else v.to(tl.float32)
        moved = source.to(MID) if DECAY == CHANNEL else (source * write[:, None]).to(MID)

        new, new_sums = (), ()  # type: tuple, tuple
        for t in tl.static_range(TILES):
            column = t * BLOCK_K + channel
            k = keys[t] if SOLVE == DELTA else tile(p_kn, row, k_l, column, k_e, m_row, K)
            if NORMALISED:
                added = tl.sum(k * write[:, None], 0)
            of_row = total
            if DECAY == CHANNEL:
                g = tile(p_sums_n, row, K, column, 1, m_row, K)
                g_last = tl.load(p_sums_n + last * K + column, mask=column < K, other=0.0)
                fade = tl.exp(tl.where(m_row[:, None], g_last[None, :] - g, 0.0))
                of_row = tl.exp(g_last) * total
                k = k * (fade * write[:, None])
                if NORMALISED:
                    added = tl.sum(k, 0)
            old = S[t] * of_row[:, None] if DECAY == CHANNEL else S[t] * of_row
            old = tl.dot(tl.trans(k.to(MID)), moved, old, input_precision=PRECISION)
            if SOLVE == RANK:
                low = tile(p_b + start * b_l, row, b_l, column, b_e, m_row, K)
                low = low * (fade * leave[:, None]) if DECAY == CHANNEL else low * leave[:, None]
                old = tl.dot(tl.trans(low.to(MID)), x.to(MID), old, input_precision=PRECISION)
            new = new + (old,)
            new_sums = new_sums + (sums[t] * of_row + added if NORMALISED else sums[t],)
        S, sums = new, new_sums

    p_final += head * K * WIDTH
    for t in tl.static_range(TILES):
        k_row = t * BLOCK_K + channel
        put(p_final, S[t], k_row, WIDTH, value, 1, k_row < K, V)
        if NORMALISED and part == 0:
            tl.store(p_final + k_row * WIDTH + V, sums[t], mask=k_row < K)
