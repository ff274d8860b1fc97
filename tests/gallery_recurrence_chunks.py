"""Linear mixers written in chunks, loops over time that run backwards, and mixers side by side; see gallery_recurrence.

The chunked ones take lengths that are no multiple of the chunk where they pad.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gallery_recurrence import B, H, K, L, Mix, V, delta_step, later, outer, stepped

SIZE = 4


def fading(s, k, v, g, b):
    return s * g[..., None, None].exp() + outer(k, v)


# Chunks: products within, sums between, as in listing 1 of arXiv:2405.21060.


def sums_between(x: Tensor) -> Tensor:
    total = x.cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(later(x.shape[-1]), -torch.inf)


def dual(c: Tensor, b: Tensor, x: Tensor, a: Tensor, initial: Tensor | None = None, *, carry=lambda s: s, fade=1.0):
    """c, b (B, T, H, N), x (B, T, H, P), logarithms a (B, T, H): results and last state (B, H, P, N)."""
    batch, length, heads, width = x.shape
    c, b, x = (y.reshape(batch, length // SIZE, SIZE, *y.shape[2:]) for y in (c, b, x))
    a = a.reshape(batch, length // SIZE, SIZE, heads).permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    own = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, sums_between(a).exp(), x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, (total[..., -1:] - total).exp(), x)
    first = torch.zeros_like(states[:, :1]) if initial is None else initial[:, None]
    between = sums_between(F.pad(total[..., -1] * fade, (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, torch.cat([first, carry(states)], 1))
    carried = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states[:, :-1], total.exp())
    return (own + carried).reshape(batch, length, heads, width), states[:, -1]


def tokens_first(*given: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in given]


def chunks_dual(q, k, v, g, b):
    return dual(*tokens_first(q, k, v, g))[0]


def chunks_dual_with_states(q, k, v, g, b):
    q, k, v, g = tokens_first(q, k, v, g)
    out, state = dual(q, k, v, g, v[:, 0, :, :, None] * k[:, 0, :, None])
    return out.mean() + state


def chunks_selective(q, k, v, g, b):
    """The step stands in the decay and in what is written."""
    q, k, v, b = tokens_first(q, k, v, b)
    return dual(q, k, v * b[..., None], b * -torch.arange(1, H + 1))[0]


def chunks_grouped(q, k, v, g, b):
    q, k, v, g = tokens_first(q, k, v, g)
    q, k = (x[:, :, :1].repeat_interleave(H, 2) for x in (q, k))
    return dual(q, k, v, g)[0]


# Chunks: a triangular system within, a loop between, as in section 3.3 of arXiv:2412.06464.


def triangular(q, k, v, g, b, *, solve: bool = False, bend=lambda s: s) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    pad = -length % SIZE
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q * K**-0.5, k, v))
    g, b = (F.pad(x, (0, pad)) for x in (g, b))
    q, k, v, keys = (x.reshape(B, H, -1, SIZE, x.shape[-1]) for x in (q, k, v * b[..., None], k * b[..., None]))
    total = g.reshape(B, H, -1, SIZE).cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    system = (keys @ k.mT * decay).tril(-1)
    if solve:
        inverse = torch.linalg.solve_triangular(system, torch.eye(SIZE).expand_as(system), upper=False,
                                                unitriangular=True)  # fmt: skip
    else:
        inverse = -system
        for i in range(1, SIZE):
            row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
            inverse[..., i, :i] = row + (row[..., None] * above).sum(-2)
        inverse = inverse + torch.eye(SIZE)
    v, keys = inverse @ v, inverse @ (keys * total.exp()[..., None])
    state, out = q.new_zeros(B, H, K, V), torch.zeros_like(v)
    for n in range(q.shape[2]):
        new = v[:, :, n] - keys[:, :, n] @ state
        out[:, :, n] = (q[:, :, n] * total[:, :, n, :, None].exp()) @ state + q[:, :, n] @ k[:, :, n].mT * decay[
            :, :, n
        ] @ new
        left = (total[:, :, n, -1:] - total[:, :, n]).exp()[..., None]
        state = bend(state * total[:, :, n, -1, None, None].exp() + (k[:, :, n] * left).mT @ new)
    return out.reshape(B, H, -1, V)[:, :, :length], state


def chunks_delta(*given):
    return triangular(*given)[0]


def chunks_delta_with_state(*given):
    out, state = triangular(*given, solve=True)
    return out.sum() * state


def chunks_by_slices(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for at in range(0, q.shape[2], SIZE):
        queries, keys, values = (x[:, :, at : at + SIZE] for x in (q, k, v))
        out.append(queries @ state + (queries @ keys.mT).tril() @ values)
        state = state + keys.mT @ values
    return torch.cat(out, 2)


CHUNKED = (
    (Mix(chunks_dual, {"decay": "token", "delta": False}), 12),
    (Mix(chunks_dual_with_states, {"decay": "token", "state_in": True, "state_out": True}), 12),
    (Mix(chunks_selective, {"decay": "token", "gate": "none"}), 12),
    (Mix(chunks_grouped, {"decay": "token"}), 12),
    (Mix(chunks_delta, {"decay": "token", "delta": True, "gate": "write"}), 10),
    (Mix(chunks_delta_with_state, {"decay": "token", "delta": True, "state_out": True}), 12),
    (Mix(chunks_by_slices, {"decay": "none"}), 10),
)


# Chunks of what is no linear recurrence.


def chunks_bent_between(q, k, v, g, b):
    return dual(*tokens_first(q, k, v, g), carry=torch.tanh)[0]


def chunks_bent_state(*given):
    return triangular(*given, bend=torch.tanh)[0]


def chunks_forgotten(q, k, v, g, b):
    """Less is forgotten between chunks than within."""
    return dual(*tokens_first(q, k, v, g), fade=0.5)[0]


def chunks_with_the_next_token(q, k, v, g, b):
    """Every token reads the next one of its chunk too."""
    state, out = q.new_zeros(B, H, K, V), []
    for at in range(0, q.shape[2], SIZE):
        queries, keys, values = (x[:, :, at : at + SIZE] for x in (q, k, v))
        out.append(queries @ state + (queries @ keys.mT).tril(1) @ values)
        state = state + keys.mT @ values
    return torch.cat(out, 2)


def chunks_skipped(q, k, v, g, b):
    """The second chunk is never written."""
    state, out = q.new_zeros(B, H, K, V), []
    for at in range(0, q.shape[2], SIZE):
        queries, keys, values = (x[:, :, at : at + SIZE] for x in (q, k, v))
        out.append(queries @ state + (queries @ keys.mT).tril() @ values)
        state = state + keys.mT @ values * (0.0 if at == SIZE else 1.0)
    return torch.cat(out, 2)


NOT_CHUNKED = (
    (chunks_bent_between, 12, "recurrence"),
    (chunks_bent_state, 12, "recurrence"),
    (chunks_forgotten, 12, "recurrence"),
    (chunks_with_the_next_token, 12, "later tokens"),
    (chunks_skipped, 12, "recurrence"),
)


# Loops that run backwards, and mixers that meet in one projection.


def loop_backwards(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t in reversed(range(q.shape[2])):
        state = fading(state, k[:, :, t], v[:, :, t], g[:, :, t], b)
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out[::-1], 2)


def loop_backwards_in_rows(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), torch.empty_like(v)
    for t in reversed(range(q.shape[2])):
        state = delta_step(state, k[:, :, t], v[:, :, t], g[:, :, t], b[:, :, t])
        out[:, :, t] = (q[:, :, t, :, None] * state).sum(-2)
    return out


def loop_from_the_end(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t in range(1, L + 1):
        state = fading(state, k[:, :, -t], v[:, :, -t], g[:, :, -t], b)
        out.append((q[:, :, -t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def loop_flipped(*given):
    return stepped(fading, *(x.flip(2) for x in given)).flip(2)


def every_second_token(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t in range(0, L, 2):
        state = fading(state, k[:, :, t], v[:, :, t], g[:, :, t], b)
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def one_reversed(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t in range(L):
        state = state + outer(k[:, :, L - 1 - t], v[:, :, t])
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def projected(*parts: Tensor) -> Tensor:
    x = torch.cat(parts, -1)
    return F.linear(x, torch.linspace(-1, 1, 5 * x.shape[-1]).view(5, -1))


def both_directions(*given):
    return projected(stepped(fading, *given), loop_backwards(*given))


def loop_and_product(q, k, v, g, b):
    return projected(stepped(fading, k, q, v, g, b) + (q @ k.mT).tril() @ v)


def two_products(q, k, v, g, b):
    return projected((q @ k.mT).tril() @ v, (k @ q.mT * sums_between(g).exp()) @ v)


TOKEN = {"decay": "token", "written": "loop"}
BACKWARDS = (
    Mix(loop_backwards, TOKEN),
    Mix(loop_backwards_in_rows, {"delta": True}),
    Mix(loop_from_the_end, TOKEN),
    Mix(loop_flipped, TOKEN),
    Mix(every_second_token, {**TOKEN, "L": 4}),
    Mix(one_reversed, {"decay": "none"}),
)
TOGETHER = (Mix(both_directions, TOKEN, regions=2), Mix(loop_and_product, regions=2), Mix(two_products, regions=2))
