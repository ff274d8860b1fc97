"""Spellings of masks that hold the keys of a list of the run: what an indexer, a gate or a threshold chose."""
from __future__ import annotations

import torch

from tests.gallery_entry import NEG, any_of, ids, qkv, spell

B, H, L, TOP, BLOCK = 2, 4, 33, 5, 8
CHOSEN = {"mask": "chosen", "scale": 0.25}
TOKENS = {**CHOSEN, "keep": "j in t0[b, i, :5] and j - i <= 0"}
BLOCKS = {**CHOSEN, "keep": "(j // 8) in t0[b, h, i, :3] and j - i <= 0"}
SCORES = {"index": lambda: torch.randn(B, L, L)}
GATES = {"gate": lambda: torch.randn(B, H, L, -(-L // BLOCK))}


def finish(scores, v):
    return scores.softmax(-1) @ v


def causal(length: int):
    i, j = ids(length)
    return j <= i


def chosen_by_indexer_added(q, k, v, index):
    """DeepSeek's sparse attention as its paper has it."""
    later = torch.full((L, L), -torch.inf).triu(1)
    best = (index + later).topk(TOP, -1)[1]
    mask = torch.full((B, L, L), -torch.inf).scatter_(-1, best, 0) + later
    return finish(q @ k.mT * 0.25 + mask.unsqueeze(1), v)


def chosen_by_indexer_unset(q, k, v, index):
    """What was not chosen is marked, in a type that the indices must be cast for."""
    best = index.masked_fill(~causal(L), -torch.inf).topk(TOP, -1).indices.to(torch.int32)
    drop = torch.ones((B, L, L), dtype=torch.bool).scatter(-1, best.long(), False).unsqueeze(1)
    return finish((q @ k.mT * 0.25).masked_fill(drop | ~causal(L), -torch.inf), v)


def gated(gate):
    """MoBA's gate: a row's own block first, none that lies ahead."""
    rows, blocks = torch.arange(L)[:, None], torch.arange(gate.shape[-1])[None]
    gate = gate.masked_fill(blocks * BLOCK > rows, -torch.inf)
    return gate.masked_fill(blocks == rows // BLOCK, torch.inf)


def spread(blocks):
    """From a mask of blocks to one of keys."""
    return blocks.repeat_interleave(BLOCK, -1)[..., :L]


def chosen_blocks(q, k, v, gate):
    best = gated(gate).topk(3, -1).indices
    keep = spread(torch.zeros(gate.shape, dtype=torch.bool).scatter(-1, best, True)) & causal(L)
    return finish((q @ k.mT * 0.25).masked_fill(~keep, -torch.inf), v)


def chosen_blocks_and_threshold(q, k, v, gate):
    """MoBA's public code: at least the third largest, and in the list of three."""
    gate = gated(gate)
    values, best = gate.topk(3, -1, largest=True, sorted=False)
    need = gate >= values.min(-1).values.unsqueeze(-1)
    need = need & torch.zeros(gate.shape, dtype=torch.bool).scatter_(-1, best, True)
    bias = spread(torch.zeros_like(gate).masked_fill(~need, -torch.inf))
    return finish((q @ k.mT + bias.masked_fill(~causal(L), -torch.inf)) * 0.25, v)


def chosen_blocks_of_a_group(q, k, v, gate):
    """NSA: the query heads of a key head choose together."""
    best = gated(gate.unflatten(1, (2, 2)).sum(2)).topk(3, -1).indices
    keep = torch.zeros((B, 2, L, gate.shape[-1]), dtype=torch.bool).scatter(-1, best, True).repeat_interleave(2, 1)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return finish((q @ k.mT * 0.25).masked_fill(~(spread(keep) & causal(L)), -torch.inf), v)


def chosen_by_importance(q, k, v, index):
    """Doge: keys matter by themselves; two masks with the same finite fill, one in the other."""
    mask = index.masked_fill(~causal(L), NEG)
    active = torch.zeros_like(mask).scatter(-1, mask.topk(TOP, -1, sorted=False).indices, 1.0)
    return finish(q @ k.mT * 0.25 + mask.masked_fill(active == 0.0, NEG).unsqueeze(1), v)


ENTRIES = (
    spell(chosen_by_indexer_added, TOKENS, parameters=SCORES),
    spell(chosen_by_indexer_unset, TOKENS, parameters=SCORES),
    spell(chosen_by_importance, {"mask": "chosen", "bias": True, "empty": any_of("mean", "never")}, train=False,
          parameters=SCORES),
    spell(chosen_blocks, BLOCKS, parameters=GATES),
    spell(chosen_blocks_and_threshold, BLOCKS, parameters=GATES),
    spell(chosen_blocks_of_a_group, {**CHOSEN, "keep": any_of("(j // 8) in t0[b, h // 2, i, :3] and j - i <= 0")},
          qkv(Hk=2), parameters=GATES),
)
