"""What looks like attention and is not, or must not be rewritten.

`regions=0`: no softmax attention over keys is there to find. `regions=None`: some true reading may exist (k
not transposed with S == E is attention over k's transpose), so only the values count. Either way the values
and gradients are eager's.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.gallery_entry import NEG, Entry, given, ids, module, qkv, spell, tensors

SQUARE = qkv(H=16, L=16, E=16)


def scored(q, k):
    return q @ k.mT * 0.25


def lower(q, k):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


# Another axis

def softmax_over_queries(q, k, v):
    return scored(q, k).softmax(-2) @ v


def softmax_over_heads(q, k, v):
    return scored(q, k).softmax(1) @ v


def softmax_over_batch(q, k, v):
    return scored(q, k).softmax(0) @ v


def softmax_over_all_keys_and_queries(q, k, v):
    scores = scored(q, k)
    return scores.flatten(-2).softmax(-1).view_as(scores) @ v


def softmax_over_merged_heads(q, k, v):
    """One softmax over the keys of all heads together."""
    B, H, L, S = (scores := scored(q, k)).shape
    probs = scores.transpose(1, 2).reshape(B, L, H * S).softmax(-1)
    return probs.view(B, L, H, S).transpose(1, 2) @ v


def normalised_over_queries_by_hand(q, k, v):
    weights = scored(q, k).exp()
    return (weights / weights.sum(-2, keepdim=True)) @ v


def maximum_over_queries(q, k, v):
    """Subtracting a maximum over queries does not cancel once 1 is added to the sum."""
    scores = scored(q, k)
    weights = torch.exp(scores - scores.amax(-2, keepdim=True))
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


# Another product

def key_not_transposed(q, k, v):
    return (q @ k * 0.25).softmax(-1) @ v


def value_from_the_left(q, k, v):
    return v @ scored(q, k).softmax(-1)


def probabilities_transposed(q, k, v):
    return scored(q, k).softmax(-1).mT @ v


def product_elementwise(q, k, v):
    return (q * k * 0.25).softmax(-1) @ v


def product_of_softmaxes(q, k, v):
    """Efficient attention: softmax of q and of k apart, no product under either."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def product_over_heads(q, k, v):
    """The scores contract heads as well as features."""
    scores = torch.einsum("bhld,bhsd->bls", q, k) * 0.25
    return torch.einsum("bls,bhsd->bhld", scores.softmax(-1), v)


def distances_for_products(q, k, v):
    return (-torch.cdist(q, k)).softmax(-1) @ v


# Something else in place of the softmax

def sum_without_exponential(q, k, v):
    scores = scored(q, k).abs()
    return scores / scores.sum(-1, keepdim=True) @ v


def exponential_without_sum(q, k, v):
    return (scored(q, k) - 4).exp() @ v


def sigmoid_weights(q, k, v):
    return scored(q, k).sigmoid() @ v


def relu_weights(q, k, v):
    return F.relu(scored(q, k)) / k.shape[-2] @ v


def softmax_twice(q, k, v):
    return scored(q, k).softmax(-1).softmax(-1) @ v


def softmax_squared(q, k, v):
    return scored(q, k).softmax(-1).square() @ v


def softmin(q, k, v):
    """softmax of the negated scores is attention; its complement is not."""
    return (1 - scored(q, k).softmax(-1)) @ v


def log_softmax_kept(q, k, v):
    return scored(q, k).log_softmax(-1) @ v


def base_two(q, k, v):
    weights = torch.exp2(scored(q, k))
    return weights / weights.sum(-1, keepdim=True) @ v


# Masks and columns in the wrong place

def mask_after_softmax(q, k, v):
    return scored(q, k).softmax(-1).masked_fill(~lower(q, k), 0.0) @ v


def mask_missing_in_the_sum(q, k, v):
    weights = scored(q, k).exp()
    return (weights * lower(q, k)) / weights.sum(-1, keepdim=True) @ v


def mask_of_the_largest_scores(q, k, v):
    scores = scored(q, k)
    floor = scores.topk(5, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < floor, -torch.inf).softmax(-1) @ v


def mask_from_the_mean_score(q, k, v):
    scores = scored(q, k)
    return torch.where(scores >= scores.mean(-1, keepdim=True), scores, NEG).softmax(-1) @ v


def mask_of_another_row(q, k, v, mask):
    """The masks of the batch are dealt out in another order."""
    return scored(q, k).masked_fill(mask.flip(0), NEG).softmax(-1) @ v


def mask_against_time(q, k, v):
    return scored(q, k).masked_fill(lower(q, k).tril(-1), -torch.inf).softmax(-1) @ v


def mask_added_as_number(q, k, v):
    """A boolean mask added to the scores adds one; it masks nothing."""
    return (scored(q, k) + lower(q, k)).softmax(-1) @ v


def mask_multiplied(q, k, v):
    """Masked scores become zero, not minus infinity: they still take weight."""
    return (scored(q, k) * lower(q, k)).softmax(-1) @ v


def mask_small_fill(q, k, v):
    """A fill of -2 is no mask."""
    return scored(q, k).masked_fill(~lower(q, k), -2.0).softmax(-1) @ v


def mask_large_fill(q, k, v):
    """A positive fill attracts."""
    return scored(q, k).masked_fill(~lower(q, k), 2.0).softmax(-1) @ v


def last_keys_sliced_off(q, k, v):
    """Not a sink: the columns dropped after the softmax are real keys."""
    return scored(q, k).softmax(-1)[..., :-1] @ v[..., :-1, :]


def sink_sliced_on_the_wrong_side(q, k, v, sinks):
    column = sinks.view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    return torch.cat([scored(q, k), column], -1).softmax(-1)[..., 1:] @ v


def sink_kept(q, k, v, sinks):
    """The sink's column meets a value row of its own."""
    column = sinks.view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    return torch.cat([scored(q, k), column], -1).softmax(-1) @ F.pad(v, (0, 0, 0, 1), value=1.0)


# Scales in the wrong place

def scale_on_value_only(q, k, v):
    return (q @ k.mT).softmax(-1) @ (v * 0.25)


def scale_after_softmax(q, k, v):
    return ((q @ k.mT).softmax(-1) * 0.25) @ v


def temperature_per_key(q, k, v, temperature):
    return (scored(q, k) / temperature).softmax(-1) @ v


def temperature_per_key_after_softmax(q, k, v, temperature):
    return (scored(q, k).softmax(-1) / temperature) @ v


def clamped_scores(q, k, v):
    return scored(q, k).clamp(-0.5, 0.5).softmax(-1) @ v


def softcap_after_mask(q, k, v):
    """The cap turns the fill into -5: nothing stays masked."""
    scores = scored(q, k).masked_fill(~lower(q, k), NEG)
    return (torch.tanh(scores / 5) * 5).softmax(-1) @ v


# Other readers of what a rewrite would take away

def probabilities_read_twice(q, k, v):
    probs = scored(q, k).softmax(-1)
    return probs @ v, probs.amax(-1)


def probabilities_twice_multiplied(q, k, v):
    probs = scored(q, k).softmax(-1)
    return probs @ (probs @ v)


def scores_returned(q, k, v):
    scores = scored(q, k)
    return scores.softmax(-1) @ v, scores


def scores_changed_after_a_reader(q, k, v):
    scores = q @ k.mT
    spread = scores.detach().std(-1, keepdim=True)
    scores.mul_(0.25).masked_fill_(~lower(q, k), -torch.inf)
    return scores.softmax(-1) @ v + spread


def probabilities_without_gradient(q, k, v):
    """The probabilities are constants to autograd: only the value has a gradient."""
    return scored(q, k).softmax(-1).detach() @ v


def scores_with_a_hidden_gradient(q, k, v):
    """Straight through: the values of one score, the gradient of another."""
    scores, other = scored(q, k), scored(q, k.flip(-1))
    return (other + (scores - other).detach()).softmax(-1) @ v


def scores_changed_through_a_view(q, k, v):
    scores = scored(q, k)
    first = scores[..., 0]
    scores += 1.0
    first.mul_(0.5)
    return scores.softmax(-1) @ v + first[..., None]


def value_changed_between(q, k, v):
    v = v.clone()
    probs = scored(q, k).softmax(-1)
    v.mul_(2.0)
    return probs @ v


def probabilities_plus_identity(q, k, v):
    return (scored(q, k).softmax(-1) + torch.eye(q.shape[-2])) @ v


# Dropout that is on, and neighbours of another kind

def dropout_on(q, k, v):
    return F.dropout(scored(q, k).softmax(-1), 0.3, training=True) @ v


def dropout_on_in_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)


def dropout_on_before_softmax(q, k, v):
    return F.dropout(scored(q, k), 0.3, training=True).softmax(-1) @ v


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 8)
        self.experts = nn.Parameter(torch.randn(8, 16, 16) / 4)

    def forward(self, x):
        weight, index = self.gate(x).softmax(-1).topk(2, -1)
        return torch.einsum("bsk,bskde,bsd->bse", weight, self.experts[index], x)


class SoftEmbedding(nn.Module):
    """A vocabulary read softly: softmax over words, then their vectors."""

    def __init__(self):
        super().__init__()
        self.words = nn.Parameter(torch.randn(50, 16))

    def forward(self, x):
        return F.linear(x, self.words).softmax(-1) @ self.words


class Pooling(nn.Module):
    """A learned vector scores the tokens."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(16, 1)

    def forward(self, x):
        return (self.score(x).softmax(1) * x).sum(1)


class Additive(nn.Module):
    """Bahdanau's scores: tanh of a sum, no product of query and key."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.score = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x):
        scores = self.score(torch.tanh(self.query(x)[:, :, None] + self.key(x)[:, None])).squeeze(-1)
        return scores.softmax(-1) @ x


def none(fn, inputs=None, **options) -> Entry:
    """No attention region is there to find."""
    return spell(fn, {}, inputs, regions=0, expect="values", **options)


def values(fn, inputs=None, **options) -> Entry:
    """Only the values count."""
    return spell(fn, {}, inputs, regions=None, expect="values", **options)


def windows():
    """A mask of its own for each row of the batch."""
    i, j = ids(16)
    return (i - j > torch.tensor([3, 9])[:, None, None])[:, None]


TOKENS = tensors((2, 33, 16))
TEMPERATURE = {"parameters": {"temperature": lambda: torch.rand(33) + 0.5}}
SINKS = {"parameters": {"sinks": lambda: torch.randn(16)}}
NEGATIVES: tuple[Entry, ...] = (
    *(none(fn, SQUARE) for fn in (
        softmax_over_queries, softmax_over_heads, softmax_over_all_keys_and_queries,
        softmax_over_merged_heads, normalised_over_queries_by_hand, maximum_over_queries,
        value_from_the_left, probabilities_transposed, product_elementwise, product_of_softmaxes,
        sum_without_exponential, exponential_without_sum,
        sigmoid_weights, relu_weights, softmax_twice, softmax_squared, log_softmax_kept, mask_after_softmax,
        mask_missing_in_the_sum, last_keys_sliced_off)),
    none(softmax_over_batch, qkv(B=16, H=16, L=16)),
    *(values(fn, SQUARE) for fn in (
        key_not_transposed, product_over_heads, distances_for_products, softmin, base_two,
        mask_of_the_largest_scores, mask_from_the_mean_score, mask_against_time, mask_added_as_number,
        mask_multiplied, mask_small_fill, mask_large_fill, scale_on_value_only, scale_after_softmax,
        clamped_scores, softcap_after_mask, probabilities_read_twice, probabilities_twice_multiplied,
        scores_returned, scores_changed_after_a_reader, scores_changed_through_a_view, value_changed_between,
        probabilities_plus_identity, probabilities_without_gradient, scores_with_a_hidden_gradient,
        dropout_on, dropout_on_in_sdpa, dropout_on_before_softmax)),
    values(mask_of_another_row, given(SQUARE, windows)),
    values(sink_sliced_on_the_wrong_side, SQUARE, **SINKS),
    values(sink_kept, SQUARE, **SINKS),
    values(temperature_per_key, **TEMPERATURE),
    values(temperature_per_key_after_softmax, **TEMPERATURE),
    module(Router, {}, TOKENS, regions=0, expect="values"),
    module(SoftEmbedding, {}, TOKENS, regions=None, expect="values"),
    module(Pooling, {}, TOKENS, regions=None, expect="values"),
    module(Additive, {}, TOKENS, regions=None, expect="values"),
)
