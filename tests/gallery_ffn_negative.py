"""What looks like a feed-forward and is none: gates, low-rank factors, routers, products over another axis."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.gallery_ffn import DOWN, FF, UP, B, Body, D, L, Spelling

LOOKALIKES: list[Spelling] = []


def lookalike(*inputs, refusal="", weights=None):
    """Enter a function that holds no feed-forward; refusal: part of the sentence that says why."""

    def enter(fn):
        shapes = weights or {"up": UP, "down": DOWN}
        LOOKALIKES.append(Spelling(fn.__name__, lambda: Body(fn, shapes), (), inputs or ((B, L, D),),
                                   refusal=refusal))
        return fn

    return enter


@lookalike(weights={"qkv": (3 * D, D), "gate": (D, D), "out": (D, D)})
def gate_on_an_attention(p, x):
    q, k, v = (t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in F.linear(x, p.qkv).chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(mixed * torch.sigmoid(F.linear(x, p.gate)), p.out)


@lookalike(weights={"a": (4, D), "b": (D, 4), "w": (D, D)})
def lora(p, x):
    return F.linear(x, p.w) + F.linear(F.linear(x, p.a), p.b) * 0.5


@lookalike(weights={"a": (4, D), "n": (4,), "b": (D, 4)})
def normed_low_rank_factors(p, x):
    return F.linear(F.rms_norm(F.linear(x, p.a), (4,), p.n), p.b)


@lookalike((B, D, 5, 3), weights={"up": (4, D, 1, 1), "down": (D, 4, 1, 1)})
def squeeze_and_excite(p, x):
    pooled = F.adaptive_avg_pool2d(x, 1)
    return x * torch.sigmoid(F.conv2d(F.relu(F.conv2d(pooled, p.up)), p.down))


@lookalike(refusal="no product of queries and keys", weights={"router": (3, D), "values": (3, D)})
def softmax_over_the_hidden_axis(p, x):
    return F.softmax(F.linear(x, p.router), -1) @ p.values


@lookalike(refusal="does not run over the features", weights={"up": UP, "down": (D, L)})
def second_product_over_tokens(p, x):
    return F.linear(F.relu(F.linear(x, p.up)).transpose(1, 2), p.down)


@lookalike((B, 8, D), refusal="tokens", weights={"up": UP, "down": (D, 2 * FF)})
def second_product_over_pairs_of_tokens(p, x):
    return F.linear(F.relu(F.linear(x, p.up)).reshape(B, 4, 2 * FF), p.down)


@lookalike((B, L, D), (B, L, D), refusal="different inputs", weights={"gate": UP, "up": UP, "down": DOWN})
def gate_of_another_input(p, x, other):
    return F.linear(F.silu(F.linear(other, p.gate)) * F.linear(x, p.up), p.down)


@lookalike((B, L, D), refusal="different inputs", weights={"gate": UP, "up": UP, "down": DOWN})
def gate_of_the_token_before(p, x):
    before = F.pad(x, (0, 0, 1, -1))
    return F.linear(F.silu(F.linear(before, p.gate)) * F.linear(x, p.up), p.down)


@lookalike((B, 8, D), refusal="different inputs", weights={"gate": UP, "up": UP, "down": DOWN})
def gate_of_the_tokens_in_reverse(p, x):
    return F.linear(F.silu(F.linear(x[:, :4], p.gate)) * F.linear(x[:, 4:], p.up), p.down)


@lookalike((B, L, D), (B, L, FF), refusal="no function of the same input", weights={"up": UP, "down": DOWN})
def hidden_unit_times_data(p, x, other):
    other = F.softmax(other, -1)
    return F.linear(F.relu(F.linear(x, p.up)) * other, p.down)


@lookalike(refusal="runs over another axis", weights={"up": UP, "down": DOWN})
def norm_over_the_tokens(p, x):
    h = F.gelu(F.linear(x, p.up))
    return F.linear(h / (h.pow(2).mean(1, keepdim=True) + 1e-6).sqrt(), p.down)


@lookalike(refusal="conv1d runs over the hidden units of several products at once",
           weights={"up": UP, "taps": (FF, 1, 3), "down": (2, D, FF // 2)})
def convolution_before_a_product_for_each_half(p, x):
    h = F.conv1d(F.linear(x, p.up).transpose(1, 2), p.taps, padding=1, groups=FF)
    return p.down[:, None] @ F.silu(h).unflatten(1, (2, -1)).transpose(0, 1)


@lookalike((B, 9, D), refusal="two activations", weights={"up": UP, "taps": (FF, 1, 3), "down": DOWN})
def activation_on_both_sides_of_a_convolution(p, x):
    h = F.conv1d(F.relu(F.linear(x, p.up)).transpose(1, 2), p.taps, padding=1, groups=FF)
    return F.linear(F.relu(h.transpose(1, 2)), p.down)


@lookalike(refusal="stands between", weights={"up": UP, "down": DOWN})
def sum_over_the_tokens_so_far(p, x):
    return F.linear(F.relu(F.linear(x, p.up)).cumsum(1), p.down)


@lookalike(refusal="also read by", weights={"up": UP, "down": DOWN})
def hidden_unit_with_another_reader(p, x):
    h = F.relu(F.linear(x, p.up))
    return F.linear(h, p.down), h.sum(-1)


@lookalike(weights={"up": UP, "down": DOWN})
def clamp_that_never_bites(p, x):
    return F.linear(F.linear(x, p.up).clamp(-65504, 65504), p.down)


@lookalike(refusal="differs from token to token", weights={"up": UP, "place": (L, FF), "down": DOWN})
def parameter_for_each_token(p, x):
    return F.linear(F.relu(F.linear(x, p.up)) * p.place, p.down)


@lookalike(refusal="3 projections", weights={"a": UP, "b": UP, "c": UP, "down": DOWN})
def product_of_three(p, x):
    return F.linear(F.linear(x, p.a) * F.silu(F.linear(x, p.b)) * F.linear(x, p.c), p.down)


@lookalike((B, 3, D, 4), weights={"out": (D, 2 * D)})
def rotary_before_a_product(p, x):
    angle = torch.arange(4.0)
    return F.linear(torch.cat([x.transpose(2, 3) * angle.cos()[:, None], x.transpose(2, 3) * angle.sin()[:, None]], -1),
                    p.out)


@lookalike(refusal="no function of the same input", weights={"gate": UP, "up": UP, "down": DOWN})
def hidden_unit_times_a_buffer_filled_in_place(p, x):
    filled = torch.zeros(B, L, FF)
    for at in range(L):
        filled[:, at] = F.linear(x[:, : at + 1].sum(1), p.up)
    return F.linear(F.silu(F.linear(x, p.gate)) * filled, p.down)
