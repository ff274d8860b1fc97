"""Keep Inductor's own attention patterns off what attnc has read and left alone.

torch 2.13's pattern pass takes a softmax over the query axis for attention where shapes allow it. Each exponential of
the joint graph is wrapped in an identity before Inductor's passes and unwrapped after them, through the public hooks
`joint_custom_pre_pass` and `joint_custom_post_pass`; other patterns and other compiles are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from attnc.store import source_version

aten = torch.ops.aten

_library = torch.library.Library("attnc", "FRAGMENT")
_library.define("shielded(Tensor(a) x) -> Tensor(a)")
_library.impl("shielded", lambda x: x.view_as(x), "CompositeExplicitAutograd")
_library.impl("shielded", lambda x: x.view_as(x), "Meta")
shielded = torch.ops.attnc.shielded.default


class _Hook(CustomGraphPass):
    """A graph pass with a cache key, after or before the one that the user set."""

    def __init__(self, apply: Callable[[fx.Graph], None], name: str, other: Any) -> None:
        self.apply, self.name, self.other = apply, name, other

    def __call__(self, graph: fx.Graph) -> None:
        self.apply(graph)
        if self.other is not None:
            self.other(graph)

    def uuid(self) -> Any:
        mine = f"attnc.{self.name}.{source_version()}"
        if self.other is None:
            return mine
        theirs = self.other.uuid() if hasattr(self.other, "uuid") else None
        return None if theirs is None else f"{mine}+{theirs}"


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor settings `given` by the user with the two hooks added; a hook of theirs runs inside ours."""
    return {
        **given,
        "joint_custom_pre_pass": _Hook(_shield, "shield", given.get("joint_custom_pre_pass")),
        "joint_custom_post_pass": _Hook(_unshield, "unshield", given.get("joint_custom_post_pass")),
    }


def _shield(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.exp.default):
        with graph.inserting_after(node):
            wrapped = graph.call_function(shielded, (node,))
        wrapped.meta.update(node.meta)
        node.replace_all_uses_with(wrapped, delete_user_cb=lambda user, wrapped=wrapped: user is not wrapped)
    for target in (aten._softmax.default, aten._safe_softmax.default):
        for node in graph.find_nodes(op="call_function", target=target):
            with graph.inserting_after(node):
                wrapped = graph.call_function(shielded, (node,))
            wrapped.meta.update(node.meta)
            node.replace_all_uses_with(wrapped, delete_user_cb=lambda user, wrapped=wrapped: user is not wrapped)


def _unshield(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=shielded):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
