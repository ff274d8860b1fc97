"""Mutants of positive gallery entries, at the level of ATen graphs.

`mutants(entry)` traces an entry to pre-dispatch ATen and yields graphs in which one condition of attention no
longer holds, or holds with another fact. All of them run; a compiler must give what they give.
"""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.gallery_entry import Core, Entry

aten = torch.ops.aten
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
PRODUCT = {aten.matmul.default, aten.bmm.default, aten.mm.default}
TRANSPOSE = {aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default}
MASK = {
    aten.add.Tensor, aten.add_.Tensor, aten.where.self, aten.where.ScalarOther,
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar,
}
SCALE = {
    aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.mul_.Tensor, aten.div_.Tensor,
}
CAST = {aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.other}
TRIANGLE = {aten.tril.default, aten.triu.default}
SDPA = aten.scaled_dot_product_attention.default
FLIPPED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt", "eq": "ne", "ne": "eq"}
SHIFTED = {"le": "lt", "ge": "gt", "lt": "le", "gt": "ge"}
COARSE = {"softmax_in_bfloat16"}  # mutations that write bfloat16 into the middle of a graph
BACKWARD = {"key_detached", "probabilities_detached"}  # mutations that only gradients can tell
Mutation = Callable[[fx.GraphModule], bool]


def trace(entry: Entry, square: bool = False) -> tuple[fx.GraphModule, tuple]:
    """The entry as a pre-dispatch ATen graph; `square`: with H = L = S = E = 16 where its inputs allow it."""
    model, args = entry.make()
    with torch.no_grad():
        if square and takes_square(model, args):
            equal = tuple(torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
            with contextlib.suppress(RuntimeError):  # a spelling with its sizes written out
                return make_fx(model, pre_dispatch=True)(*equal), equal
        return make_fx(model, pre_dispatch=True)(*args), args


def takes_square(model: nn.Module, args: tuple) -> bool:
    """Whether the module is a bare function of query, key and value, so that any sizes fit."""
    bare = isinstance(model, Core) and not model.names and len(args) == 3
    return bare and all(x.ndim == 4 and x.shape == args[0].shape and x.dtype == torch.float32 for x in args)


def mutants(entry: Entry) -> Iterator[tuple[str, fx.GraphModule, tuple]]:
    """(name of the mutation, graph, inputs) for every mutation that applies to `entry` and still runs."""
    graph, args = trace(entry, square=True)
    for name, mutation in MUTATIONS.items():
        mutant = copy.deepcopy(graph)
        if not mutation(mutant):
            continue
        mutant.graph.lint()
        mutant.recompile()
        if runs(mutant, args):
            yield name, mutant, args


def runs(graph: fx.GraphModule, args: tuple) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(graph)(*(x.clone() for x in args))
    except (RuntimeError, IndexError):
        return False
    return True


# Reading a graph

def nodes(graph: fx.GraphModule, targets) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target in targets]


def shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def chain(graph: fx.GraphModule) -> tuple[list[fx.Node], fx.Node | None, fx.Node | None]:
    """(nodes from the softmax back to the score product, that product, the product with the value)."""
    softmax = next(iter(nodes(graph, SOFTMAX)), None)
    if softmax is None:
        return [], None, None
    paths, first = [[softmax]], None
    while paths and first is None:
        path = paths.pop(0)
        for node in path[-1].all_input_nodes:
            if node.target in PRODUCT:
                first, path = node, [*path, node]
                break
            paths.append([*path, node])
    users, second = list(softmax.users), None
    while users and second is None:
        node = users.pop(0)
        second = node if node.target in PRODUCT else None
        users += node.users
    return (path[:-1] if first else [softmax]), first, second


def after(node: fx.Node, target, *args, kwargs=None) -> fx.Node:
    """A new node right behind `node`, with its metadata."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(target, args, kwargs or {})
    made.meta = dict(node.meta)
    return made


def wrap_operand(user: fx.Node | None, index: int, target, *more) -> bool:
    """Apply `target(operand, *more)` to one operand of `user`."""
    if user is None or not isinstance(user.args[index], fx.Node):
        return False
    operand = user.args[index]
    with user.graph.inserting_before(user):
        made = user.graph.call_function(target, (operand, *more))
    made.meta = dict(operand.meta)
    user.update_arg(index, made)
    return True


def wrap_result(node: fx.Node | None, target, *more) -> bool:
    """Let every reader of `node` read `target(node, *more)` instead."""
    if node is None:
        return False
    made = after(node, target, node, *more)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return True


def scores_in(node: fx.Node, path: list[fx.Node], first: fx.Node) -> fx.Node | None:
    """The argument of `node` through which the score product reaches it."""
    return next((arg for arg in node.all_input_nodes if arg in path or arg is first), None)


# Mutations of the softmax and the products

def softmax_of(graph: fx.GraphModule) -> fx.Node | None:
    return next(iter(nodes(graph, SOFTMAX)), None)


def other_axis(axis: int) -> Mutation:
    def mutate(graph: fx.GraphModule) -> bool:
        softmax = softmax_of(graph)
        if softmax is None:
            return False
        dims = len(shape(softmax))
        if dims < -axis or softmax.args[1] % dims == axis % dims:
            return False
        softmax.update_arg(1, axis)
        return True
    return mutate


def key_not_transposed(graph: fx.GraphModule) -> bool:
    first = chain(graph)[1]
    if first is None or getattr(first.args[1], "target", None) not in TRANSPOSE:
        return False
    first.update_arg(1, first.args[1].args[0])
    return True


def query_and_key_exchanged(graph: fx.GraphModule) -> bool:
    first = chain(graph)[1]
    if first is None or shape(first.args[0]) != shape(first.args[1]):
        return False
    first.args = (first.args[1], first.args[0])
    return True


def softmax_again(graph: fx.GraphModule) -> bool:
    return wrap_result(softmax_of(graph), aten.softmax.int, -1)


def probabilities_transposed(graph: fx.GraphModule) -> bool:
    return wrap_operand(chain(graph)[2], 0, aten.transpose.int, -2, -1)


def probabilities_read_twice(graph: fx.GraphModule) -> bool:
    softmax, output = softmax_of(graph), next(iter(graph.graph.find_nodes(op="output")))
    if softmax is None:
        return False
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    output.args = ((*results, softmax),)
    return True


def value_rolled(graph: fx.GraphModule) -> bool:
    return wrap_operand(chain(graph)[2], 1, aten.roll.default, [1], [-2])


def value_batch_flipped(graph: fx.GraphModule) -> bool:
    return wrap_operand(chain(graph)[2], 1, aten.flip.default, [0])


def key_detached(graph: fx.GraphModule) -> bool:
    """The values stay; the gradient of the key is gone."""
    return wrap_operand(chain(graph)[1], 1, aten.detach.default)


def probabilities_detached(graph: fx.GraphModule) -> bool:
    return wrap_result(softmax_of(graph), aten.detach.default)


def key_rolled(graph: fx.GraphModule) -> bool:
    return wrap_operand(chain(graph)[1], 1, aten.roll.default, [1], [-1])


# Mutations of the scores

def scores_clamped(graph: fx.GraphModule) -> bool:
    return wrap_result(chain(graph)[1], aten.clamp.default, -0.5, 0.5)


def scores_squared(graph: fx.GraphModule) -> bool:
    return wrap_operand(softmax_of(graph), 0, aten.mul.Tensor, 1.0) and wrap_result(
        chain(graph)[1], aten.pow.Tensor_Scalar, 2)


def mask_from_scores(graph: fx.GraphModule) -> bool:
    """Scores far below their row's maximum are masked, as an indexer or a top-k does."""
    softmax = softmax_of(graph)
    if softmax is None:
        return False
    scores = softmax.args[0]
    floor = after(scores, aten.amax.default, scores, [-1], True)
    floor = after(floor, aten.sub.Tensor, floor, 0.5)
    low = after(floor, aten.lt.Tensor, scores, floor)
    softmax.update_arg(0, after(low, aten.masked_fill.Scalar, scores, low, -10000.0))
    return True


def mask_after_softmax(graph: fx.GraphModule) -> bool:
    """The mask's own node is applied to the probabilities instead of the scores."""
    path, first, _ = chain(graph)
    for node in path:
        scores = scores_in(node, path, first) if node.target in MASK and first else None
        if scores is not None and len(node.all_input_nodes) > 1:
            args, kwargs = node.args, node.kwargs
            node.replace_all_uses_with(scores)
            softmax = softmax_of(graph)
            moved = after(softmax, node.target)
            softmax.replace_all_uses_with(moved)
            moved.args = tuple(softmax if arg is scores else arg for arg in args)
            moved.kwargs = dict(kwargs)
            graph.graph.erase_node(node)
            return True
    return False


def scale_moved_to_value(graph: fx.GraphModule) -> bool:
    path, first, second = chain(graph)
    for node in path:
        if node.target in SCALE and first and second and isinstance(node.args[1], (int, float)):
            node.replace_all_uses_with(scores_in(node, path, first))
            return wrap_operand(second, 1, node.target, node.args[1])
    return False


def scale_changed(graph: fx.GraphModule) -> bool:
    scales = [node for node in nodes(graph, SCALE) if isinstance(node.args[1], (int, float))]
    for node in scales:
        node.update_arg(1, node.args[1] * 1.7)
    return bool(scales)


def softmax_in_input_dtype(graph: fx.GraphModule) -> bool:
    softmax = softmax_of(graph)
    if softmax is None:
        return False
    before, dtype = softmax.args[0], softmax.args[2] if len(softmax.args) > 2 else softmax.kwargs.get("dtype")
    if dtype is not None:
        softmax.args, softmax.kwargs = softmax.args[:2], {}
        return True
    if getattr(before, "target", None) in CAST:
        softmax.update_arg(0, before.args[0])
        return True
    return False


def softmax_in_bfloat16(graph: fx.GraphModule) -> bool:
    softmax = softmax_of(graph)
    if softmax is None or softmax.meta["val"].dtype != torch.float32:
        return False
    wrap_operand(softmax, 0, aten.to.dtype, torch.bfloat16)
    return wrap_result(softmax, aten.to.dtype, torch.float32)


# Mutations of the mask

def compare_otherwise(table: dict[str, str]) -> Mutation:
    def mutate(graph: fx.GraphModule) -> bool:
        changed = False
        for node in graph.graph.nodes:
            packet = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            if node.op == "call_function" and packet in table:
                node.target = getattr(getattr(aten, table[packet]), node.target._overloadname)
                changed = True
        return changed
    return mutate


def diagonal_moved(by: int) -> Mutation:
    def mutate(graph: fx.GraphModule) -> bool:
        triangles = nodes(graph, TRIANGLE)
        for node in triangles:
            diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
            node.args, node.kwargs = (node.args[0], diagonal + by), {}
        return bool(triangles)
    return mutate


def triangle_flipped(graph: fx.GraphModule) -> bool:
    triangles = nodes(graph, TRIANGLE)
    for node in triangles:
        node.target = aten.triu.default if node.target is aten.tril.default else aten.tril.default
    return bool(triangles)


# Mutations of an SDPA call

def sdpa_argument(index: int, name: str, change: Callable) -> Mutation:
    """Change one argument of every scaled_dot_product_attention; `change` may return None: does not apply."""
    def mutate(graph: fx.GraphModule) -> bool:
        changed = False
        for node in nodes(graph, {SDPA}):
            value = node.args[index] if len(node.args) > index else node.kwargs.get(name)
            new = change(node, value)
            if new is None:
                continue
            node.kwargs = {**node.kwargs, **({} if len(node.args) > index else {name: new})}
            node.args = tuple(new if at == index else arg for at, arg in enumerate(node.args))
            changed = True
        return changed
    return mutate


def rolled_mask(node: fx.Node, mask: fx.Node | None) -> fx.Node | None:
    if mask is None:
        return None
    with node.graph.inserting_before(node):
        return node.graph.call_function(aten.roll.default, (mask, [1], [-2]))


def flipped_key(node: fx.Node, key: fx.Node) -> fx.Node:
    with node.graph.inserting_before(node):
        return node.graph.call_function(aten.flip.default, (key, [-3]))


MUTATIONS: dict[str, Mutation] = {
    "softmax_over_last": other_axis(-1),
    "softmax_over_queries": other_axis(-2),
    "softmax_over_heads": other_axis(-3),
    "softmax_over_batch": other_axis(-4),
    "key_not_transposed": key_not_transposed,
    "query_and_key_exchanged": query_and_key_exchanged,
    "softmax_again": softmax_again,
    "probabilities_transposed": probabilities_transposed,
    "probabilities_read_twice": probabilities_read_twice,
    "value_rolled": value_rolled,
    "value_batch_flipped": value_batch_flipped,
    "key_rolled": key_rolled,
    "key_detached": key_detached,
    "probabilities_detached": probabilities_detached,
    "scores_clamped": scores_clamped,
    "scores_squared": scores_squared,
    "mask_from_scores": mask_from_scores,
    "mask_after_softmax": mask_after_softmax,
    "scale_moved_to_value": scale_moved_to_value,
    "scale_changed": scale_changed,
    "softmax_in_input_dtype": softmax_in_input_dtype,
    "softmax_in_bfloat16": softmax_in_bfloat16,
    "comparison_flipped": compare_otherwise(FLIPPED),
    "comparison_shifted": compare_otherwise(SHIFTED),
    "diagonal_above": diagonal_moved(1),
    "diagonal_below": diagonal_moved(-1),
    "triangle_flipped": triangle_flipped,
    "sdpa_causal_flipped": sdpa_argument(5, "is_causal", lambda node, value: not value),
    "sdpa_scale_changed": sdpa_argument(6, "scale", lambda node, value: 1.7 * (value or 0.25)),
    "sdpa_mask_rolled": sdpa_argument(3, "attn_mask", rolled_mask),
    "sdpa_key_heads_flipped": sdpa_argument(1, "key", flipped_key),
}
