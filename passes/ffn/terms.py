"""The hidden unit of a feed-forward as a formula of its operands, read backwards from the second product.

Each node is read at an index, so that views, halves and transposes are followed exactly: what reaches a product with
weights must name the same token and a feature that depends on the hidden coordinate only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, add, sub
from attnc.passes.ffn.flow import (
    CASTS,
    DROPOUTS,
    FACTORS,
    NORMS,
    PADS,
    QUOTIENTS,
    REDUCTIONS,
    SUMS,
    VIEWS,
    Flows,
    is_dropping,
    is_elementwise,
)
from attnc.passes.ffn.formula import Formula, Operand, Ref, Term, bends, frozen, is_constant, refs_of
from attnc.passes.ffn.products import Weighted, depthwise
from attnc.passes.graph import GraphFacts, Unliftable, hint, integer, op_name, shape_of, tensor_of
from attnc.passes.views import Index, Ranges, broadcast_index, through

aten = torch.ops.aten

# Longer chains are loops written out, and reading is recursive.
DEEPEST, MOST_TERMS = 60, 600


class Reader:
    """Reads the data of one product with weights. Raises: Unliftable."""

    def __init__(self, facts: GraphFacts, flows: Flows, second: Weighted, sources: frozenset[fx.Node]) -> None:
        self.facts, self.flows, self.second, self.sources = facts, flows, second, sources
        self.ranges = Ranges()
        self.formula = Formula()
        self._memo: dict[tuple[fx.Node, Index], int] = {}
        self._operand_at: dict[int, int] = {}
        self._parameters: dict[fx.Node, str] = {}
        self._depth = 0
        self.hidden: dict[str, Expr] = {}
        self.tokens: dict[str, Expr] = {}

    def run(self) -> Formula:
        index = []
        for label, extent in zip(self.second.data_labels, shape_of(self.second.data), strict=True):
            contracted = label in self.second.contracted
            name = f"j{self.second.contracted.index(label)}" if contracted else f"t{len(self.tokens)}"
            (self.hidden if contracted else self.tokens)[name] = extent
            self.ranges.declare(name, extent)
            index.append(ZERO if extent == ONE and not contracted else Expr("var", (name,)))
        self.read(self.second.data, tuple(index))
        return self.formula

    # Terms.

    def _add(self, term: Term) -> int:
        self.formula.terms.append(term)
        return len(self.formula.terms) - 1

    def read(self, node: fx.Node, index: Index) -> int:
        key = (node, index)
        if key not in self._memo:
            if self._depth > DEEPEST or len(self.formula.terms) > MOST_TERMS:
                raise Unliftable("more lies between the products than a feed-forward holds", node)
            self._depth += 1
            at = self._memo[key] = self._read(node, index)
            self._depth -= 1
            if self.formula.terms[at].bent:
                self.formula.bent[node] = None
        return self._memo[key]

    def _read(self, node: fx.Node, index: Index) -> int:
        if self.flows.is_fixed(node):
            return self._leaf(node, index)
        if self.facts.root(node) in self.facts.writes:
            raise Unliftable("it is modified in place after it was computed", node)
        if node in self.sources:
            return self._operand(node, index)
        self.formula.nodes[node] = None
        name = op_name(node)
        if name in REDUCTIONS and not is_elementwise(node):
            return self._row(node, index)
        for names, rule in _READERS:
            if name in names:
                return rule(self, node, index)
        if depthwise(node) is not None:
            return self._convolution(node, index)
        if is_elementwise(node):
            return self._call(node, index)
        raise Unliftable(f"{name} stands between the activation and the second product", node)

    def _operand(self, node: fx.Node, index: Index) -> int:
        operand = self._projected(self.flows.products[node], index)
        if operand not in self.formula.operands:
            self.formula.operands.append(operand)
        position = self.formula.operands.index(operand)
        found = self._add(Term("operand", name=str(position)))
        self._operand_at[found] = position
        return found

    def _projected(self, product: Weighted, index: Index, first: Weighted | None = None) -> Operand:
        """The operand at `index` of a product; first: the product that makes its data, to be read through."""
        node = product.node
        at = dict(zip(product.out_labels, index, strict=True))
        feature = product.feature(index)
        tokens = tuple(at[label] for label in product.tokens)
        if not feature.names() <= self.hidden.keys():
            raise Unliftable("the second product does not run over the features of the first", node)
        if any(x.names() & self.hidden.keys() for x in tokens):
            raise Unliftable("the second product runs over tokens of the first, not only over its features", node)
        source = self._source(product, product.data_index(index))
        if first is not None and source[0] is first.node:
            source = self._source(first, first.data_index(source[1]), dropped=True)
        return Operand(product, feature, tokens, source)

    def _source(self, product: Weighted, index: Index, dropped: bool = False) -> tuple[fx.Node, Index]:
        """Where the data of a product come from, behind views, with `dropped` behind dropout too."""
        node, at = product.data, index
        for k, label in enumerate(product.contracted):
            self.ranges.declare(f"c{k}", product.extent(label))
        while True:
            if op_name(node) in CASTS or (dropped and op_name(node) in DROPOUTS):
                node = node.args[0]
                continue
            view = through(node, at, self.ranges)
            if view is None:
                return node, at
            node, at = view

    def _leaf(self, node: fx.Node, index: Index) -> int:
        """A parameter or a constant."""
        number = self._number(node)
        if number is not None:
            return self._add(Term("number", args=(number,)))
        if any(e.names() & self.tokens.keys() for e in index):
            raise Unliftable("what is applied to the hidden unit differs from token to token", node)
        value = tensor_of(node)
        if value is None:
            raise Unliftable("a number known at run time only is part of the function", node)
        if value.numel() == 1 and node.op == "call_function":  # a function of a parameter, such as softplus(alpha)
            name = op_name(node)
            if (name in VIEWS or name in CASTS) and tensor_of(node.args[0]) is not None:
                return self.read(node.args[0], (ZERO,) * len(shape_of(node.args[0])))
            if is_elementwise(node):
                return self._call(node, index)
        parameter = self.flows.origin(node)
        if value.numel() == 1:
            name = self._parameters.setdefault(parameter, f"scalar {len(self._parameters)}")
        else:
            name = "vector"
        return self._add(Term("learned", name=name))

    def _number(self, node: fx.Node) -> float | bool | None:
        """The value of a constant of one element, None where it is not known."""
        name = op_name(node)
        position = {"full": 1, "scalar_tensor": 0, "full_like": 1, "new_full": 2}.get(name)
        if position is not None and len(node.args) > position and isinstance(node.args[position], int | float):
            return node.args[position]
        if name.removesuffix("_like").removeprefix("new_") in ("zeros", "ones"):
            return float("ones" in name)
        if name in ("lift_fresh_copy", "lift_fresh", "clone", "detach", *CASTS) and isinstance(node.args[0], fx.Node):
            return self._number(node.args[0])
        if node.op != "get_attr":
            return None
        held: Any = self.facts.graph.owning_module
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        held = getattr(held, "constant", None) if isinstance(held, torch._subclasses.FakeTensor) else held
        known = isinstance(held, torch.Tensor) and not isinstance(held, torch.nn.Parameter) and held.numel() == 1
        return held.item() if known else None

    # Operators.

    def _passed(self, node: fx.Node, index: Index) -> int:
        """A view."""
        if op_name(node) == "detach" and self.facts.needs_grad(node.args[0]):
            raise Unliftable("a gradient is cut between the products", node)
        if op_name(node) == "getitem" and op_name(node.args[0]) in (*REDUCTIONS, *NORMS, *DROPOUTS):
            if op_name(node.args[0]) in REDUCTIONS:
                return self._row(node.args[0], index, int(node.args[1]))
            if node.args[1] != 0:
                raise Unliftable(f"the second result of {op_name(node.args[0])} is used", node)
            return self.read(node.args[0], index)
        view = through(node, index, self.ranges)
        if view is None:
            raise Unliftable(f"where {op_name(node)} takes its elements from is not understood", node)
        if isinstance(node.args[0], fx.Node) and view[0] is not node.args[0]:
            self.formula.nodes[node.args[0]] = None  # the list that getitem reads
        return self.read(*view)

    def _cast(self, node: fx.Node, index: Index) -> int:
        source, result = tensor_of(node.args[0]), tensor_of(node)
        if source is None or result is None or (source.dtype != torch.bool and not result.is_floating_point()):
            raise Unliftable("the hidden unit is rounded to integers", node)
        return self.read(node.args[0], index)

    def _dropout(self, node: fx.Node, index: Index) -> int:
        below = self.read(node.args[0], index)
        if not is_dropping(node):
            return below
        self.formula.dropout = float(node.args[1])
        return self._step(below, f"dropout {float(node.args[1]):g}")

    def _step(self, below: int, name: str, mixes: bool = False) -> int:
        term = self.formula.terms[below]
        mixed = term.mixed or (mixes and term.bent)
        return self._add(replace(term, kind="step", target=None, args=(Ref(below),), kwargs=(), name=name, mixed=mixed))

    def _norm(self, node: fx.Node, index: Index) -> int:
        name = op_name(node).removeprefix("native_").removeprefix("_fused_")
        if name == "batch_norm":
            own, others = index[1:2], index[:1] + index[2:]
        else:
            last = len(index) - len(node.args[1])
            own, others = index[last:], index[:last]
        self._runs_over(node, own, others)
        return self._step(self.read(node.args[0], index), name)

    def _runs_over(self, node: fx.Node, own: Index, others: Index) -> None:
        of = frozenset().union(*(x.names() for x in own))
        if of & self.tokens.keys() and of & self.hidden.keys():
            told = "runs over the hidden units of several products at once, each of which takes its own part of them"
            raise Unliftable(f"{op_name(node)} {told}", node)
        if of & self.tokens.keys() or any(x.names() & self.hidden.keys() for x in others):
            raise Unliftable(f"{op_name(node)} does not run over the hidden axis", node)

    def _convolution(self, node: fx.Node, index: Index) -> int:
        kernel = depthwise(node)
        assert kernel is not None
        channel = len(index) - len(kernel) - 1
        self._runs_over(node, index[channel : channel + 1], index[:channel] + index[channel + 1 :])
        self.formula.shifted = True
        return self._step(self.read(node.args[0], index), f"conv {'x'.join(map(str, kernel))}", mixes=True)

    def _pad(self, node: fx.Node, index: Index) -> int:
        widths = list(node.args[1])
        at = list(index)
        for k in range(len(widths) // 2):
            dim = len(index) - 1 - k
            if hint(widths[2 * k]) or hint(widths[2 * k + 1]):
                self._runs_over(node, (), index[dim : dim + 1])
                at[dim] = sub(index[dim], integer(widths[2 * k]))
        self.formula.shifted = True
        return self.read(node.args[0], tuple(at))

    def _glu(self, node: fx.Node, index: Index) -> int:
        source = node.args[0]
        dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)) % len(index)
        after = index[:dim] + (add(index[dim], shape_of(node)[dim]),) + index[dim + 1 :]
        value, gate = self.read(source, index), self.read(source, after)
        bounded = self._join(node, aten.sigmoid.default, (Ref(gate),), ())
        return self._join(node, aten.mul.Tensor, (Ref(value), Ref(bounded)), ())

    def _row(self, node: fx.Node, index: Index, item: int | None = None) -> int:
        """A reduction; it must run over the hidden axis, all of it and nothing else."""
        schema = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
        source, dims = node.args[0], given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        rank = len(shape_of(source))
        if not isinstance(dims, list | tuple) or len(dims) != 1 or len(self.hidden) != 1:
            raise Unliftable(f"{op_name(node)} does not run over the hidden axis alone", node)
        dim, (name, extent) = int(dims[0]) % rank, *self.hidden.items()
        kept = index if given.get("keepdim") else (*index[:dim], ZERO, *index[dim:])
        others = kept[:dim] + kept[dim + 1 :]
        if shape_of(source)[dim] != extent or any(x.names() & self.hidden.keys() for x in others):
            raise Unliftable(f"{op_name(node)} runs over another axis than the hidden one", node)
        below = self.read(source, (*kept[:dim], Expr("var", (name,)), *kept[dim + 1 :]))
        rest = {k: v for k, v in given.items() if k not in (schema[0], "dim", "keepdim")}
        rest |= {"dim": -1 if isinstance(given["dim"], int) else (-1,), "keepdim": True}
        if any(isinstance(v, fx.Node) for v in rest.values()):
            raise Unliftable(f"{op_name(node)} with settings known at run time only", node)
        return self._add(Term("row", node.target, (Ref(below),), frozen(rest), str(item or 0), rowwise=True))

    def _call(self, node: fx.Node, index: Index) -> int:
        outer = shape_of(node)
        updated = self._with_update(node, index)
        if updated is not None:
            return updated

        def at(argument: fx.Node) -> Ref:
            if tensor_of(argument) is None:
                raise Unliftable("a number known at run time only is part of the function", argument)
            return Ref(self.read(argument, broadcast_index(index, shape_of(argument), outer)))

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), at)
        biased = self._with_bias(node, args)
        return biased if biased is not None else self._join(node, node.target, args, frozen(kwargs))

    def _with_update(self, node: fx.Node, index: Index) -> int | None:
        """A product of products of the same input that is added to a projection is a low-rank update of its weight."""
        if op_name(node) != "add" or node.kwargs or len(node.args) != 2:
            return None
        for main, side in (node.args, node.args[::-1]):
            pair = self._factors(side)
            if pair is None or tensor_of(main) is None or self._factors(main) is not None:
                continue
            first, second, passed = pair
            shape = shape_of(node)
            if shape != shape_of(main) or shape != shape_of(second.node):
                return None
            at = self.read(main, index)
            position = self._operand_at.get(at)
            if position is None:
                return None
            operand, update = self.formula.operands[position], self._projected(second, index, first)
            if (update.feature, update.tokens, update.source) != (operand.feature, operand.tokens, operand.source):
                return None
            pairs = (*operand.updates, (first, second))
            self.formula.operands[position] = replace(operand, updates=pairs)
            self.formula.nodes.update(dict.fromkeys((*passed, second.node, first.node)))
            return at
        return None

    def _factors(self, node: Any) -> tuple[Weighted, Weighted, list[fx.Node]] | None:
        """Two products with weights, one of the other's result, behind casts and constant factors."""
        passed = []
        while isinstance(node, fx.Node) and (
            op_name(node) in CASTS or (op_name(node) in FACTORS and isinstance(node.args[1], int | float))
        ):
            passed.append(node)
            node = node.args[0]
        second = self.flows.products.get(node)
        if second is None:
            return None
        first = self.flows.products.get(self.flows.origin(second.data))
        return None if first is None else (first, second, passed)

    def _with_bias(self, node: fx.Node, args: tuple[Any, ...]) -> int | None:
        """A parameter that is added to a projection is the projection's bias."""
        refs = [x for x in args if isinstance(x, Ref)]
        if op_name(node) != "add" or node.kwargs or len(refs) != 2 or len(args) != 2:
            return None
        nodes = [x for x in node.args if isinstance(x, fx.Node)]
        for (one, projected), (other, bias) in (zip(refs, nodes, strict=True), [*zip(refs, nodes, strict=True)][::-1]):
            position = self._operand_at.get(one.at)
            if position is None or self.formula.terms[other.at].kind != "learned" or len(projected.users) > 1:
                continue
            operand = self.formula.operands[position]
            if operand.bias is None and operand.product.bias is None:
                self.formula.operands[position] = replace(operand, bias=bias)
                return one.at
        return None

    def _join(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> int:
        terms = [self.formula.terms[x.at] for x in refs_of((args, kwargs))]
        live = [t for t in terms if t.kind not in ("learned", "number")]
        live = [t for t in live if not is_constant(t)]
        full = [t for t in live if not t.rowwise]
        name = str(target).split(".")[1] if "." in str(target) else str(target)
        if full and len(full) < len(live):
            if len(full) > 1 or name not in SUMS | FACTORS | QUOTIENTS or (name in QUOTIENTS and live[0].rowwise):
                raise Unliftable(f"{name} joins hidden units with a sum over them", node)
            return self._add(replace(full[0], kind="norm", target=target, args=args, kwargs=kwargs, name=""))
        nonlinear = bool(full) and bends(name, args, [self.formula.terms[x.at] for x in args if isinstance(x, Ref)])
        if nonlinear and any(t.mixed for t in full):
            raise Unliftable("a convolution over the tokens stands between two activations", node)
        bent, mixed = nonlinear or any(t.bent for t in full), any(t.mixed for t in full)
        kind = "call" if live else "constant"
        return self._add(Term(kind, target, args, kwargs, "", bent, bool(live) and not full, mixed))


_READERS = (
    (VIEWS, Reader._passed),
    (CASTS, Reader._cast),
    (DROPOUTS, Reader._dropout),
    (NORMS, Reader._norm),
    (PADS, Reader._pad),
    (("glu",), Reader._glu),
)
