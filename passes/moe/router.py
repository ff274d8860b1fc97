"""What a router computes: the function from logits to chosen experts and weights, told by its values.

The router's nodes are run on random logits (`run`); what comes out is compared with what each known score function,
choice and normalisation would give. A bias of the choice, groups of experts, a table of tokens, a limit of tokens for
each expert and factors of the logits are told the same way. What fits nothing is called "other" and still reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnc.passes.ffn.flow import is_elementwise
from attnc.passes.graph import hint, op_name, tensor_of
from attnc.passes.moe.outcome import Outcome, Wanted, between, outcome, shape, size
from attnc.passes.moe.products import contraction, is_weight
from attnc.passes.moe.rows import CASTS
from attnc.passes.moe.run import behind, inputs, run
from attnc.passes.moe.scores import choice_of, close, weights_of

MOST_CUTS = 6  # element-wise functions between the product and the score function


@dataclass
class Router:
    """A router in the graph, and what it was found to compute, as fields of MoERule.

    logits:  its product, None where it is not in the graph; data, weight, bias: the operands.
    classes: experts, and classes without one.
    nodes:   from the product to what the experts are given.
    choice_bias, expert_scale: vectors that take part in the choice, that multiply the weights.
    """

    logits: fx.Node | None
    data: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    classes: int
    top_k: int = 0
    nodes: list[fx.Node] = field(default_factory=list)
    choice_bias: fx.Node | None = None
    expert_scale: fx.Node | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Routers:
    """The routers of one graph; equal ones are run once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Router] = {}

    def of(self, wanted: Wanted, tokens: int, experts: int) -> Router | str:
        """The router behind `wanted`, or why there is none."""
        nodes = between(wanted.targets)
        key = (*_key(wanted, nodes), tokens, experts)
        known = self._known.get(key)
        if known is not None:
            return _like(known, nodes)
        found = router_of(wanted, tokens, experts)
        if isinstance(found, Router):
            self._known[key] = found
        return found


def _key(wanted: Wanted, nodes: Sequence[fx.Node]) -> tuple[object, ...]:
    """Equal for routers that compute the same of their product and vectors."""
    place = {node: at for at, node in enumerate(nodes)}

    def named(x: fx.Node) -> object:
        return ("node", place[x]) if x in place else ("outside", str(x.meta.get("val")))

    said = [
        (
            str(n.target) if n.op == "call_function" else n.op,
            str(n.meta.get("val")),
            () if contraction(n) is not None else str(fx.node.map_arg((n.args, dict(n.kwargs)), named)),
        )
        for n in nodes
    ]
    columns = [(e, [(place[n], pick) for n, pick in fs], rows and place[rows]) for e, fs, rows in wanted.columns]
    ids = None if wanted.ids is None else place[wanted.ids]
    return (*said, ids, *(place[n] for n in wanted.weights), str(columns))


def _like(known: Router, nodes: list[fx.Node]) -> Router:
    """A router whose nodes stand where those of `known` do."""
    twin = dict(zip(known.nodes, nodes, strict=True))
    if known.logits is None:
        return replace(known, nodes=nodes, facts=dict(known.facts))
    own = _found(twin[known.logits], nodes)
    bias, scale = (None if x is None else twin[x] for x in (known.choice_bias, known.expert_scale))
    facts = {**known.facts, **{name: own.facts[name] for name in ("router_dtype", "logit_bias")}}
    return replace(own, classes=known.classes, top_k=known.top_k, choice_bias=bias, expert_scale=scale, facts=facts)


def router_of(wanted: Wanted, tokens: int, experts: int) -> Router | str:
    """The router behind `wanted`, or why there is none."""
    nodes = between(wanted.targets)
    routed = [n for n in nodes if _classes(n, tokens) is not None]
    if not routed and any(n.op != "placeholder" for n in wanted.targets):
        inner = [n for n in nodes if contraction(n) is not None]
        if inner or wanted.ids is None:
            return "no product of the tokens with a router's weights leads to the choice"
    if not routed:
        given = {"score": "given", "over": "each", "choice": "given"}
        return Router(None, None, None, None, experts, _slots(wanted, tokens), nodes=nodes, facts=given)
    logits = routed[-1]
    router = _found(logits, nodes)
    if len(routed) == 1:
        for cut in _cuts(logits):
            facts = _fitted(wanted, router, cut, tokens, experts)
            if facts is not None:
                router.facts |= facts
                return router
    router.facts |= {"score": "other", "over": "each", **_unknown(wanted, router, logits, tokens, experts)}
    return router


def _slots(wanted: Wanted, tokens: int) -> int:
    """Experts of each token, by the shape of the ids."""
    value = tensor_of(wanted.ids)
    return max(1, size(value) // tokens) if value is not None else 1


def _found(logits: fx.Node, nodes: list[fx.Node]) -> Router:
    dot, value = contraction(logits), tensor_of(logits)
    assert dot is not None and value is not None
    data, weight = (dot.left, dot.right) if is_weight(dot.right) else (dot.right, dot.left)
    facts = {"router_dtype": str(value.dtype).removeprefix("torch."), "logit_bias": dot.bias is not None}
    classes = hint(value.shape[-1])
    return Router(logits, data, weight, dot.bias, classes, nodes=nodes, facts=facts)


def _classes(node: fx.Node, tokens: int) -> int | None:
    """The width of logits: a floating product with weights, one row for each token."""
    value, dot = tensor_of(node), contraction(node)
    if value is None or dot is None or not value.is_floating_point() or not any(map(is_weight, (dot.left, dot.right))):
        return None
    width = hint(value.shape[-1])
    return width if width > 1 and size(value) == tokens * width else None


def _cuts(logits: fx.Node) -> Iterator[fx.Node]:
    """The logits, then what element-wise functions make of them one by one, as long as they are read once."""
    node = logits
    for _ in range(MOST_CUTS):
        yield node
        users = [u for u in node.users if u.users]
        if len(users) != 1:
            return
        others = [x for x in users[0].all_input_nodes if x is not node and not is_weight(x)]
        (node,) = users
        if not (op_name(node) in CASTS or is_elementwise(node)) or others:
            return


def _fitted(wanted: Wanted, router: Router, cut: fx.Node, tokens: int, experts: int) -> dict[str, Any] | None:
    """The facts of the router with `cut` in place of its logits; None where no score function fits."""
    assert router.logits is not None
    before = _before(router.logits, cut)
    seen = outcome(wanted, cut, tokens, experts) if before is not None else ""
    if before is None or isinstance(seen, str):
        return None
    scaled, biases = _roles(wanted, cut, seen)
    found = weights_of(seen, experts, scaled)
    if found is None:
        return None
    router.top_k, router.expert_scale = seen.ids.shape[-1], scaled
    if found["score"] == "softmax" and not _softmax_over_all(router, seen):
        found |= {"over": "chosen", "normalise": ""}
    shared = found.get("normalise") == "chosen and shared"
    chosen = _chosen(wanted, router, seen, found["score"], biases, experts if shared else router.classes)
    return {**found, **before, "expert_scale": scaled is not None, **chosen}


def _unknown(wanted: Wanted, router: Router, logits: fx.Node, tokens: int, experts: int) -> dict[str, Any]:
    """How experts are chosen, where their weights are of no known kind."""
    seen = outcome(wanted, logits, tokens, experts)
    if isinstance(seen, str):
        router.top_k = _slots(wanted, tokens)
        return {"choice": "other"}
    router.top_k = seen.ids.shape[-1]
    return _chosen(wanted, router, seen, "", _roles(wanted, logits, seen)[1], router.classes)


def _chosen(
    wanted: Wanted, router: Router, seen: Outcome, score: str, biases: Sequence[fx.Node], classes: int
) -> dict[str, Any]:
    assert router.logits is not None
    if wanted.ids is not None and router.logits not in behind([wanted.ids], {router.logits}):
        return {"choice": "table"}
    facts, router.choice_bias = choice_of(seen, router.nodes, score, classes, biases)
    return facts


def _roles(wanted: Wanted, cut: fx.Node, seen: Outcome) -> tuple[fx.Node | None, list[fx.Node]]:
    """(the vector that multiplies weights, vectors that reach the choice only), by the way they take."""
    values = _floating(wanted.factors)
    choosing = set(behind([wanted.ids], {cut})) if wanted.ids is not None else None
    biases = [n for n in seen.vectors if n not in values]
    scaled = [n for n in seen.vectors if n in values and choosing is not None and n not in choosing]
    return (scaled[0] if scaled else None), biases


def _floating(targets: Sequence[fx.Node]) -> set[fx.Node]:
    """What `targets` depend on by value: the way does not lead through integers and truth values."""
    seen: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        value = node.meta.get("val")
        tensors = value if isinstance(value, tuple | list) else (value,)
        if node not in seen and any(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
            seen.add(node)
            stack += inputs(node)
    return seen


def _before(logits: fx.Node, cut: fx.Node) -> dict[str, Any] | None:
    """What lies between the logits and `cut`: nothing, a factor, or a soft limit; None for anything else."""
    value = tensor_of(logits)
    assert value is not None
    if cut is logits:
        return {}
    x = torch.linspace(-6, 6, hint(value.shape[-1])).expand(shape(value)).contiguous()
    given = {
        n: torch.full(shape(t), 0.7)
        for n in behind([cut], {logits})
        if n.op == "placeholder" and (t := tensor_of(n)) is not None
    }
    values = run([cut], {**given, logits: x})
    if isinstance(values, str) or not isinstance(values[0], Tensor) or values[0].shape != x.shape:
        return None
    y = values[0].float()
    ratio = (x * y).sum() / (x * x).sum()
    if close(y, x * ratio):
        return {} if abs(float(ratio) - 1) < 1e-5 else {"logit_scale": float(f"{float(ratio):.6g}")}
    numbers = [abs(float(a)) for n in behind([cut], {logits}) for a in n.args if isinstance(a, int | float)]
    cap = next((c for c in numbers if c > 0 and close(y, c * torch.tanh(x / c))), None)
    return None if cap is None else {"softcap": cap}


def _softmax_over_all(router: Router, seen: Outcome) -> bool:
    """Whether a softmax is taken of all classes; over the chosen ones it is the same as a normalised one."""
    softmaxes = [n for n in router.nodes if op_name(n) in ("softmax", "_softmax") and tensor_of(n) is not None]
    widths = [hint(tensor_of(n).shape[int(n.args[1])]) for n in softmaxes]  # type: ignore[union-attr]
    return not widths or seen.logits.shape[-1] in widths
