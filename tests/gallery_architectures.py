"""Spellings met in transformers' architectures that the other files of the gallery do not hold."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.gallery_entry import NEG, any_of, given, ids, qkv, spell, tensors

PLAIN = {"mask": "none", "scale": 0.25, "group": 1, "bias": False, "sink": False, "softcap": None}


def shared_operand_scaled(x):
    """One scaled tensor is query, key and value: the factor leaves the scores and stays in the values."""
    y = x * 0.5
    return (y @ y.mT / 4).softmax(-1) @ y


def value_scaled(q, k, v):
    """MiMo: the values are scaled before the repetition of heads."""
    v = (v * 3.0)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
    k = k[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
    return (q @ k.mT * 0.25).softmax(-1) @ v


def key_divided_by_tensor(q, k, v):
    """DeBERTa: merged heads, the transposed key divided by the root of a tensor."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(-1, -2) / torch.sqrt(torch.tensor(16.0)))
    return torch.bmm(scores.view(-1, 4, 33, 33).softmax(-1).view(-1, 33, 33), v)


def packed_unbound(qkv_packed):
    """Hiera: one packed projection, permuted and unbound."""
    q, k, v = qkv_packed.permute(2, 0, 3, 1, 4).unbind(0)
    return ((q * 0.25) @ k.transpose(-1, -2)).softmax(-1) @ v


def query_probe(k, v, probe):
    """SigLIP's pooling head: one learned query per head."""
    q = probe.repeat(k.shape[0], 1, 1, 1)
    return (q @ k.mT * 0.25).softmax(-1) @ v


def weights_filled_after(q, k, v, keep):
    """CPM-Ant: the mask of the scores is applied to the weights again; a row without keys gives 0."""
    scores = (q @ k.mT * 0.25).masked_fill(keep == False, -torch.inf)  # noqa: E712
    return scores.softmax(-1).masked_fill(keep == False, 0) @ v  # noqa: E712


def weights_chosen_after(q, k, v, keep):
    scores = torch.where(keep, q @ k.mT * 0.25, NEG)
    return torch.where(keep, scores.softmax(-1), 0.0) @ v


def weights_filled_after_causal(q, k, v):
    i, j = ids(q.shape[-2])
    scores = (q @ k.mT * 0.25).masked_fill(j > i, -torch.inf)
    return scores.softmax(-1).masked_fill(j > i, 0.0) @ v


def mask_written_by_blocks(q, k, v):
    """Pixtral: a mask filled block by block, one block per image."""
    mask = torch.full((33, 33), NEG)
    for start, end in ((0, 16), (16, 33)):
        mask[start:end, start:end] = 0
    return (q @ k.mT * 0.25 + mask[None, None].expand(2, 1, -1, -1)).softmax(-1) @ v


def mask_written_and_passed(q, k, v):
    mask = torch.zeros(33, 33)
    mask[:, 20:] = NEG
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def mask_by_vmap(q, k, v):
    """A predicate of single positions, spread by vmap: windowed, or without limit for the first keys."""
    def keep(i, j):
        return (j <= i) & (i - j < 12)

    i = torch.arange(q.shape[-2])
    mask = torch.vmap(torch.vmap(keep, in_dims=(None, 0)), in_dims=(0, None))(i, i)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def padding_added_from_integers(q, k, v, attention_mask):
    """Large numbers that cancel for each kept key: they must not lose the scores on the way."""
    mask = (attention_mask[:, None, None, :].to(q.dtype) - 1.0) * 1e30
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


def weights_and_output(q, k, v):
    """The output is attention; the weights are wanted as well."""
    weights = (q @ k.mT * 0.25).softmax(-1)
    return weights @ v, weights


def weights_changed_in_place(q, k, v):
    weights = (q @ k.mT * 0.25).softmax(-1)
    weights.view(-1, 33, 33)[:, 3:5] = 0
    return weights @ v


def scores_changed_by_slice(q, k, v):
    scores = q @ k.mT * 0.25
    scores.view(-1, 33, 33)[:, 3:5, :7] = -1e30
    return scores.softmax(-1) @ v


def query_changed_by_slice(q, k, v):
    scaled = q * 0.25
    scaled.view(-1, 33, 16)[:, 3] = 0.5
    return (scaled.view(q.shape) @ k.mT).softmax(-1) @ v


def mask_changed_after_reading(q, k, v):
    mask = torch.zeros(33, 33)
    weights = (q @ k.mT * 0.25 + mask[None]).softmax(-1)
    mask[:, 3] = 7.0
    return weights @ v + mask[0, 3]


def weights_filled_with_another_mask(q, k, v, keep):
    scores = (q @ k.mT * 0.25).masked_fill(~keep, -1e30)
    return scores.softmax(-1).masked_fill(~keep.mT, 0.0) @ v


def weights_filled_with_ones(q, k, v, keep):
    scores = (q @ k.mT * 0.25).masked_fill(~keep, -1e30)
    return scores.softmax(-1).masked_fill(~keep, 1.0) @ v


def scores_squared(q, k, v):
    scores = q @ k.mT * 0.25
    return (scores * scores).softmax(-1) @ v


def scores_squared_with_temperature(q, k, v, temperature):
    """The temperature is one number per head, but the product occurs twice beside it."""
    scores = q @ k.mT * 0.25
    return (scores * scores * temperature).softmax(-1) @ v


def kept():
    """A mask with rows that keep nothing."""
    mask = torch.rand(2, 1, 33, 33) > 0.3
    mask[:, :, 5] = False
    return mask


def right_padded():
    return (torch.arange(33) < torch.tensor([33, 12])[:, None]).long()


MASKED = given(qkv(), kept)
ENTRIES = (
    spell(shared_operand_scaled, {**PLAIN, "scale": any_of(0.25, 0.125, 0.0625)}, tensors((2, 4, 33, 16))),
    spell(value_scaled, {**PLAIN, "group": any_of(1, 2)}, qkv(Hk=2)),
    spell(key_divided_by_tensor, {**PLAIN, "scale": any_of(1.0, 0.25)}),
    spell(packed_unbound, PLAIN, tensors((2, 33, 3, 4, 16))),
    spell(query_probe, {**PLAIN, "L": 1}, tensors((2, 4, 33, 16), (2, 4, 33, 16), (1, 4, 1, 16))),
    spell(weights_filled_after, {"mask": "tensor", "empty": "zero"}, MASKED, train=False),
    spell(weights_chosen_after, {"mask": "tensor", "empty": "zero"}, MASKED),
    spell(weights_filled_after_causal, {**PLAIN, "mask": "causal", "empty": "never"}),
    spell(mask_written_by_blocks, {"mask": any_of("none", "tensor"), "scale": 0.25}),
    spell(mask_written_and_passed, {"mask": any_of("none", "tensor"), "scale": 0.25}),
    spell(mask_by_vmap, {**PLAIN, "mask": "window"}),
    spell(padding_added_from_integers, {"mask": "padding", "scale": 0.25}, given(qkv(), right_padded)),
    spell(weights_and_output, {}, regions=None, expect="refused"),
    spell(weights_changed_in_place, {}, regions=None, expect="values", train=False),
    spell(scores_squared_with_temperature, {}, given(qkv(), lambda: torch.rand(4, 1, 1)), regions=None,
          expect="values"),
    *(spell(fn, {}, regions=None, expect="values") for fn in (
        scores_squared, scores_changed_by_slice, query_changed_by_slice, mask_changed_after_reading)),
    *(spell(fn, {}, MASKED, regions=None, expect="values") for fn in (
        weights_filled_with_another_mask, weights_filled_with_ones)),
)
