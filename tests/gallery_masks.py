"""Spellings of masks: how a mask is applied, and what a mask may mean."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.gallery_entry import NEG, any_of, given, ids, qkv, spell

CAUSAL = {"mask": "causal", "scale": 0.25, "bias": False}
FINITE = {**CAUSAL, "fill": any_of("finite", "any")}  # every row keeps its own key: the fill never shows
INFINITE = {**CAUSAL, "fill": any_of("-inf", "any")}
PADDED = any_of("padding", "predicate")


def finish(scores, v):
    return scores.softmax(-1) @ v


def fill(q, k, v, keep, value=-torch.inf):
    """Scaled scores, `value` where `keep` is False, softmax, product: the frame of the predicate entries."""
    return finish((q @ k.mT * 0.25).masked_fill(~keep, value), v)


# How a causal mask is applied

def apply_add_infinite_triu(q, k, v):
    mask = torch.full((q.shape[-2], k.shape[-2]), -torch.inf).triu(1)
    return finish(q @ k.mT * 0.25 + mask, v)


def apply_add_finfo_min(q, k, v):
    i, j = ids(q.shape[-2])
    mask = torch.where(j <= i, 0.0, NEG)
    return finish(q @ k.mT * 0.25 + mask[None, None], v)


def apply_add_product_of_triu(q, k, v):
    mask = torch.triu(torch.ones(q.shape[-2], k.shape[-2]), diagonal=1) * -1e9
    return finish(q @ k.mT * 0.25 + mask, v)


def apply_add_one_minus(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2]).tril()
    return finish(q @ k.mT * 0.25 + (1.0 - keep) * -1e9, v)


def apply_add_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.25
    scores += torch.full((q.shape[-2], k.shape[-2]), -torch.inf).triu(1)
    return finish(scores, v)


def apply_where(q, k, v):
    i, j = ids(q.shape[-2])
    return finish(torch.where(j <= i, q @ k.mT * 0.25, torch.tensor(NEG)), v)


def apply_where_scalar(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2]).tril().bool()
    return finish(torch.where(keep, q @ k.mT * 0.25, -1e9), v)


def apply_where_before_scale(q, k, v):
    """Masked first, scaled after: the fill is scaled too."""
    i, j = ids(q.shape[-2])
    return finish(torch.where(i >= j, q @ k.mT, -torch.inf) * 0.25, v)


def apply_masked_fill(q, k, v):
    keep = torch.tril(torch.ones(q.shape[-2], k.shape[-2]))
    return finish((q @ k.mT * 0.25).masked_fill(keep == 0, float("-inf")), v)


def apply_masked_fill_finfo(q, k, v):
    drop = torch.triu(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool), 1)
    scores = q @ k.mT * 0.25
    return finish(scores.masked_fill(drop, torch.finfo(scores.dtype).min), v)


def apply_masked_fill_in_place(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(0.25)
    scores.masked_fill_(torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, float("-inf"))
    return finish(scores, v)


def apply_multiplication(q, k, v):
    """GPT-1 and CTRL: s * tril - 1e4 * (1 - tril)."""
    keep = torch.ones(q.shape[-2], k.shape[-2]).tril()
    return finish(q @ k.mT * 0.25 * keep - 1e4 * (1 - keep), v)


def apply_indexed_assignment(q, k, v):
    drop = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    scores = q @ k.mT * 0.25
    scores[:, :, drop] = -torch.inf
    return finish(scores, v)


def apply_gpt2_buffer(q, k, v, causal):
    L, S = q.shape[-2], k.shape[-2]
    scores = q @ k.mT / torch.full([], q.shape[-1] ** 0.5)
    return finish(torch.where(causal[:, :, S - L:S, :S], scores, torch.full([], NEG)), v)


def apply_buffer_of_ones(q, k, v, bias):
    """nanoGPT: `bias[:, :, :T, :T] == 0`."""
    T = q.shape[-2]
    return finish((q @ k.mT * 0.25).masked_fill(bias[:, :, :T, :T] == 0, -torch.inf), v)


def apply_by_hand_exp_times_mask(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2]).tril()
    scores = q @ k.mT * 0.25
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * keep
    return weights / weights.sum(-1, keepdim=True) @ v


def apply_bool_as_float_log(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2]).tril()
    return finish(q @ k.mT * 0.25 + keep.log(), v)


def apply_flipped_comparison(q, k, v):
    i, j = ids(q.shape[-2])
    return finish((q @ k.mT * 0.25).masked_fill(i < j, -torch.inf), v)


def apply_difference_of_positions(q, k, v):
    i, j = ids(q.shape[-2])
    return finish((q @ k.mT * 0.25).masked_fill((i - j).sign() == -1, -torch.inf), v)


def apply_expanded_mask(q, k, v):
    B, _H, L, _ = q.shape
    keep = torch.ones(L, L, dtype=torch.bool).tril()[None, None].expand(B, 1, L, L)
    mask = torch.zeros(B, 1, L, L).masked_fill(~keep, NEG)
    return finish(q @ k.mT * 0.25 + mask[:, :, :, :L], v)


def apply_generated_square_mask(q, k, v):
    mask = torch.nn.Transformer.generate_square_subsequent_mask(q.shape[-2])
    return finish(q @ k.mT * 0.25 + mask, v)


def apply_cumsum_positions(q, k, v):
    position = torch.ones(q.shape[-2], dtype=torch.long).cumsum(0) - 1
    return fill(q, k, v, position[None, :] <= position[:, None])


def apply_second_fill_after_softmax(q, k, v):
    """Masked before and after the softmax: the second fill changes nothing (DeBERTa, Longformer)."""
    drop = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    probs = (q @ k.mT * 0.25).masked_fill(drop, NEG).softmax(-1)
    return probs.masked_fill(drop, 0.0) @ v


def apply_clamped_to_finfo(q, k, v):
    """OPT and XGLM: `max(scores + mask, finfo.min)`."""
    mask = torch.full((q.shape[-2], k.shape[-2]), NEG).triu(1)
    return finish(torch.max(q @ k.mT * 0.25 + mask, torch.tensor(NEG)), v)


def cross_causal_end_aligned(q, k, v):
    L, S = q.shape[-2], k.shape[-2]
    i, j = torch.arange(L)[:, None] + (S - L), torch.arange(S)
    return fill(q, k, v, j <= i)


# What a mask may mean

def means_window(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (j <= i) & (i - j < 8))


def means_window_tril_triu(q, k, v):
    band = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril().triu(-7)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band)


def means_window_two_sided(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (i - j).abs() <= 5)


def means_window_negated(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, ~((j > i) | (j <= i - 8)))


def means_window_two_steps(q, k, v):
    """A causal mask and a window mask added one after the other."""
    L = q.shape[-2]
    causal = torch.full((L, L), NEG).triu(1)
    window = torch.full((L, L), NEG).tril(-8)
    return finish(torch.clamp(q @ k.mT * 0.25 + causal + window, min=NEG), v)


def means_chunked(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (i // 16 == j // 16) & (j <= i))


def means_blocks(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, torch.div(i, 16, rounding_mode="floor") == torch.div(j, 16, rounding_mode="floor"))


def means_prefix(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (j <= i) | (j < 10))


def means_prefix_from_lengths(q, k, v, prefix):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (j <= i) | (j < prefix[:, None, None, None]))


def means_documents(q, k, v, document):
    return fill(q, k, v, document[:, None, :, None] == document[:, None, None, :])


def means_documents_causal(q, k, v, document):
    i, j = ids(q.shape[-2])
    same = document[:, :, None] == document[:, None, :]
    return fill(q, k, v, (same & (j <= i))[:, None])


def means_documents_from_positions(q, k, v, position):
    """Packed rows: a new document starts where the position falls back to zero."""
    i, j = ids(q.shape[-2])
    document = (position == 0).cumsum(-1)
    return fill(q, k, v, (document[:, None, :, None] == document[:, None, None, :]) & (j <= i))


def means_key_lengths(q, k, v, lengths):
    j = torch.arange(k.shape[-2])
    return fill(q, k, v, j < lengths[:, None, None, None])


def means_attention_mask(q, k, v, attention_mask):
    """BERT: (1 - mask) * finfo.min, from zeros and ones."""
    mask = (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return finish(q @ k.mT * 0.25 + mask, v)


def means_attention_mask_bool(q, k, v, attention_mask):
    return fill(q, k, v, attention_mask[:, None, None, :].bool(), NEG)


def means_causal_and_padding(q, k, v, attention_mask):
    i, j = ids(q.shape[-2])
    keep = (j <= i)[None, None] & attention_mask[:, None, None, :].bool()
    return finish(q @ k.mT * 0.25 + torch.where(keep, 0.0, NEG), v)


def means_left_padding_finfo(q, k, v, attention_mask):
    """The first rows keep no key: with a finite fill they average over all keys."""
    i, j = ids(q.shape[-2])
    keep = (j <= i)[None, None] & (attention_mask[:, None, None, :] == 1)
    return finish((q @ k.mT * 0.25).masked_fill(~keep, NEG), v)


def means_left_padding_infinite(q, k, v, attention_mask):
    """The first rows keep no key: by hand they are NaN."""
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (j <= i)[None, None] & (attention_mask[:, None, None, :] == 1))


def means_left_padding_sdpa(q, k, v, attention_mask):
    """The first rows keep no key: SDPA gives zeros."""
    i, j = ids(q.shape[-2])
    keep = (j <= i)[None, None] & (attention_mask[:, None, None, :] == 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def means_global_and_window(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, ((i - j).abs() < 4) | (j < 2) | (i < 2))


def means_strided(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, ((i - j) % 4 == 0) & (j <= i))


def means_dilated_window(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, ((i - j).remainder(2) == 0) & ((i - j) < 12) & (i >= j))


def means_block_table(q, k, v, table):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, table[i // 16, j // 16] | (i == j))


def means_head_dependent_window(q, k, v):
    i, j = ids(q.shape[-2])
    width = 4 * (torch.arange(q.shape[1]) + 1)
    return fill(q, k, v, (j <= i) & (i - j < width[:, None, None]))


def means_exclusive_or(q, k, v):
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (i == j) | ((j < i).logical_xor(j // 8 == i // 8)))


def means_everything(q, k, v):
    """A mask that keeps all is no mask."""
    i, j = ids(q.shape[-2])
    return fill(q, k, v, (j <= i) | (j > i))


def lengths():
    return torch.tensor([33, 12])


def right_padded():
    return (torch.arange(33) < lengths()[:, None]).long()


def left_padded():
    return right_padded().flip(-1)


def documents():
    return torch.tensor([[0] * 10 + [1] * 13 + [2] * 10, [0] * 20 + [1] * 13])


def restarting_positions():
    return torch.stack([torch.cat([torch.arange(10), torch.arange(23)]), torch.arange(33)])


def predicate(fn, label, *more, train=True, **facts):
    stated = {"mask": label, "scale": 0.25, **facts}
    return spell(fn, stated, given(qkv(L=33 if more else 70), *more), train=train)


ENTRIES = (
    spell(apply_add_infinite_triu, INFINITE, qkv(L=70)),
    spell(apply_add_finfo_min, FINITE),
    spell(apply_add_product_of_triu, FINITE),
    spell(apply_add_one_minus, FINITE),
    spell(apply_add_in_place, INFINITE),
    spell(apply_where, FINITE),
    spell(apply_where_scalar, FINITE),
    spell(apply_where_before_scale, INFINITE),
    spell(apply_masked_fill, INFINITE),
    spell(apply_masked_fill_finfo, FINITE),
    spell(apply_masked_fill_in_place, INFINITE),
    spell(apply_multiplication, FINITE),
    spell(apply_indexed_assignment, {"scale": 0.25}),
    spell(apply_gpt2_buffer, {**FINITE, "mask": any_of("causal", "tensor")},
          buffers={"causal": lambda: torch.ones(128, 128, dtype=torch.bool).tril().view(1, 1, 128, 128)}),
    spell(apply_buffer_of_ones, {**INFINITE, "mask": any_of("causal", "tensor")},
          buffers={"bias": lambda: torch.ones(128, 128).tril().view(1, 1, 128, 128)}),
    spell(apply_by_hand_exp_times_mask, {}, expect="values", regions=None),
    spell(apply_bool_as_float_log, {"mask": any_of("causal", "tensor")}),
    spell(apply_flipped_comparison, INFINITE),
    spell(apply_difference_of_positions, {"mask": any_of("causal", "predicate")}),
    spell(apply_expanded_mask, FINITE),
    spell(apply_generated_square_mask, INFINITE),
    spell(apply_cumsum_positions, CAUSAL),
    spell(apply_second_fill_after_softmax, {}, expect="values", regions=None),
    spell(apply_clamped_to_finfo, {"scale": 0.25}),
    spell(cross_causal_end_aligned, {"mask": any_of("causal", "predicate")}, qkv(S=70)),
    predicate(means_window, "window"),
    predicate(means_window_tril_triu, "window"),
    predicate(means_window_two_sided, "window"),
    predicate(means_window_negated, "window"),
    predicate(means_window_two_steps, any_of("window", "predicate", "tensor")),
    predicate(means_chunked, "chunked"),
    predicate(means_blocks, "chunked"),
    predicate(means_prefix, "prefix"),
    predicate(means_prefix_from_lengths, any_of("prefix", "predicate"), lambda: torch.tensor([5, 20])),
    predicate(means_documents, "document", documents),
    predicate(means_documents_causal, "document", documents),
    predicate(means_documents_from_positions, any_of("document", "predicate"), restarting_positions),
    predicate(means_key_lengths, "padding", lengths),
    predicate(means_attention_mask, "padding", right_padded),
    predicate(means_attention_mask_bool, "padding", right_padded),
    predicate(means_causal_and_padding, PADDED, right_padded),
    predicate(means_left_padding_finfo, PADDED, left_padded, fill="finite"),
    predicate(means_left_padding_infinite, PADDED, left_padded, fill="-inf", train=False),
    predicate(means_left_padding_sdpa, PADDED, left_padded, fill="-inf"),
    predicate(means_global_and_window, "predicate"),
    predicate(means_strided, "predicate"),
    predicate(means_dilated_window, "predicate"),
    predicate(means_block_table, "predicate", lambda: torch.rand(5, 5) > 0.5),
    predicate(means_head_dependent_window, "predicate"),
    predicate(means_exclusive_or, "predicate"),
    predicate(means_everything, "none"),
)
