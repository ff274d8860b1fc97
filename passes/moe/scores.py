"""Which score function, normalisation and choice give what a router was seen to give.

Source: DeepSeek-AI 2024, arXiv:2412.19437, equations 12 to 16; Fedus et al. 2021, arXiv:2101.03961, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnc.passes.ffn.activations import NAMED
from attnc.passes.graph import hint, op_name, tensor_of
from attnc.passes.moe.outcome import Outcome
from attnc.passes.moe.run import inputs

SAME = 1e-3  # relative; the run is in single precision
PICKS = ("topk", "sort", "argsort")

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: NAMED[name] for name in ("sigmoid", "sqrtsoftplus", "softplus", "relu", "tanh", "exp")},
    "identity": lambda x: x,
}


def close(a: Tensor, c: Tensor) -> bool:
    """Whether two tensors agree but for rounding in single precision."""
    return bool(((a - c).abs() <= SAME * (c.abs() + 1e-3 * c.abs().max() + 1e-9)).all())


def _scores(name: str, logits: Tensor) -> Tensor:
    return logits.softmax(-1) if name == "softmax" else ELEMENTWISE[name](logits)


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


def weights_of(seen: Outcome, experts: int, scaled: fx.Node | None) -> dict[str, Any] | None:
    """The facts by which the weights follow from logits and choice; dropped tokens do not count. None: no known ones.

    scaled: a vector that multiplies the weights, one number for each expert.
    """
    weights = seen.weights
    if scaled is not None:
        factors = seen.vectors[scaled].reshape(-1)
        if len(factors) <= int(seen.ids.max()):
            return None
        weights = weights / factors[seen.ids]
    live = weights != 0
    if not bool(live.any()) or int(seen.ids.max()) >= seen.logits.shape[-1]:
        return None
    if float(weights[live].std(unbiased=False)) < 1e-6:
        return {"score": "none", "over": "each", "scale": _rounded(weights[live][0])}
    for name in ("softmax", *ELEMENTWISE):
        scores = _scores(name, seen.logits)
        chosen = scores.gather(-1, seen.ids)
        for way, total in _totals(scores, chosen, experts):
            expected = (chosen / total)[live]
            scale = (weights[live] * expected).sum() / (expected * expected).sum()
            if bool(torch.isfinite(scale)) and float(scale) != 0 and close(weights[live], expected * scale):
                over = "all" if name == "softmax" else "each"
                return {"score": name, "over": over, "normalise": way, "scale": _rounded(scale)}
    return None


def _totals(scores: Tensor, chosen: Tensor, experts: int) -> Iterator[tuple[str, Tensor]]:
    """What a token's weights may be divided by."""
    yield "", torch.ones(())
    if chosen.shape[-1] > 1:
        yield "chosen", chosen.sum(-1, keepdim=True)
    if scores.shape[-1] > experts:
        yield "chosen and shared", chosen.sum(-1, keepdim=True) + scores[:, experts:].sum(-1, keepdim=True)


def _rounded(value: Tensor) -> float:
    near = float(f"{float(value):.4g}")
    return float(round(near)) if abs(near - round(near)) < 1e-3 and round(near) else near


# --------------------------------------------------------------------------------------------------------------------
# Choice
# --------------------------------------------------------------------------------------------------------------------


def choice_of(
    seen: Outcome, nodes: Sequence[fx.Node], score: str, classes: int, biases: Sequence[fx.Node]
) -> tuple[dict[str, Any], fx.Node | None]:
    """(facts of the choice, the bias that takes part in it) of the best among the first `classes`.

    nodes: the router's. biases: vectors that reach the choice only.
    """
    k, logits = seen.ids.shape[-1], seen.logits[:, :classes]
    if k >= classes:
        return {"choice": "all"}, None
    names = [op_name(n) for n in nodes]
    bias = next((b for b in biases if seen.vectors[b].numel() == classes), None)
    dropped = seen.weights == 0
    facts: dict[str, Any] = {"capacity": _capacity(nodes)} if "cumsum" in names else {}
    written = "top_k" if any(p in names for p in PICKS) or k == 1 else "masked_max"
    known = ["softmax", *ELEMENTWISE]
    for name in dict.fromkeys((*([score] if score in known else known), "identity")):
        values = _scores(name, logits)
        if bias is not None:
            values = values + seen.vectors[bias].reshape(-1)
        for count, best, judged in _groupings(nodes, classes):
            if _agrees(_grouped(values, count, best, judged), seen.ids, k, dropped):
                grouped = {"groups": count, "top_groups": best, "group_score": judged} if count > 1 else {}
                return {**facts, **grouped, "choice": written, "choice_bias": bias is not None}, bias
    return {**facts, "choice": "other"}, None


def _groupings(nodes: Sequence[fx.Node], classes: int) -> Iterator[tuple[int, int, str]]:
    """(groups, best groups, how they are judged) that the router's nodes suggest, none first."""
    yield 1, 1, ""
    for node in nodes:
        source = tensor_of(node.args[0]) if op_name(node) == "topk" else None
        if source is None:
            continue
        count, best = hint(source.shape[-1]), hint(node.args[1])
        if 1 < count < classes and classes % count == 0 and best <= count:
            yield count, best, "top2"
            yield count, best, "max"


def _grouped(scores: Tensor, groups: int, best: int, judged: str) -> Tensor:
    """Scores with -inf outside of each token's best groups."""
    if groups == 1:
        return scores
    split = scores.reshape(len(scores), groups, -1)
    merit = split.amax(-1) if judged == "max" else split.topk(min(2, split.shape[-1]), dim=-1).values.sum(-1)
    keep = torch.zeros_like(merit).scatter_(1, merit.topk(best, dim=-1).indices, 1.0).bool()
    return split.masked_fill(~keep[..., None], float("-inf")).reshape(scores.shape)


def _agrees(scores: Tensor, ids: Tensor, k: int, dropped: Tensor) -> bool:
    """Whether `ids` are the k best of `scores` for each token, those that were dropped aside."""
    best = scores.topk(k, dim=-1).indices.sort(-1).values
    lost = dropped.any(-1)
    same = (best == ids.sort(-1).values).all(-1) | lost
    return bool((~lost).any()) and float(same.float().mean()) > 0.999  # ties of single precision


def _capacity(nodes: Sequence[fx.Node]) -> int | None:
    """The number that running counts of an expert's tokens are compared with."""
    counted: set[fx.Node] = set()
    for node in nodes:
        if op_name(node) == "cumsum" or any(x in counted for x in inputs(node)):
            counted.add(node)
        if node in counted and op_name(node) in ("le", "lt", "ge", "gt"):
            limit = next((a for a in node.args if isinstance(a, int | float)), None)
            if limit is not None:
                from_zero = any(op_name(x) == "sub" for x in nodes if x in counted)
                return int(limit) + (op_name(node) in ("le", "ge")) - (not from_zero)
    return None
