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
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from attnc.store import source_version

aten = torch.ops.aten

_library = torch.library.Library("attnc", "FRAGMENT")
_library.define("shielded(Tensor(a) x) -> Tensor(a)")
_library.impl("shielded", lambda x: x.view_as(x), "CompositeExplicitAutograd")
_library.impl("shielded", lambda x: x.view_as(x), "Meta")
shielded = torch.ops.attnc.shielded.default

_EXPONENTIALS = (aten.exp.default, aten._softmax.default, aten._safe_softmax.default)


class _Hook(CustomGraphPass):
    """Graph passes in a row, with one cache key; None among their keys keeps the compile out of Inductor's caches."""

    def __init__(self, name: str, passes: tuple[Any, ...]) -> None:
        self.name, self.passes = name, passes

    def __call__(self, graph: fx.Graph) -> None:
        for apply in self.passes:
            apply(graph)

    def uuid(self) -> Any:
        theirs = [getattr(p, "uuid", lambda: None)() for p in self.passes if p not in (shield, unshield)]
        return None if None in theirs else (f"attnc.{self.name}.{source_version()}", *theirs)


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor settings `given` by the user with the two hooks added; the user's own passes see no shields."""
    before, after = (_passes(given, name) for name in ("joint_custom_pre_pass", "joint_custom_post_pass"))
    return {
        **given,
        "joint_custom_pre_pass": _Hook("shield", (*before, shield)),
        "joint_custom_post_pass": _Hook("unshield", (unshield, *after)),
    }


def _passes(given: Mapping[str, Any], name: str) -> tuple[Callable[[fx.Graph], None], ...]:
    """The passes that hang on a hook already: the user's for this compile, else those set for all compiles."""
    found = given.get(name, getattr(config, name))
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def shield(graph: fx.Graph) -> None:
    """Wrap each exponential of `graph`."""
    for target in _EXPONENTIALS:
        for node in graph.find_nodes(op="call_function", target=target):
            with graph.inserting_after(node):
                wrapped = graph.call_function(shielded, (node,))
            wrapped.meta.update(node.meta)
            node.replace_all_uses_with(wrapped, delete_user_cb=lambda user, wrapped=wrapped: user is not wrapped)


def unshield(graph: fx.Graph) -> None:
    """Unwrap what `shield` wrapped, in subgraphs that a pass made of it too."""
    owner = graph.owning_module
    graphs = {graph, *(m.graph for m in owner.modules() if isinstance(m, fx.GraphModule))} if owner else {graph}
    for part in graphs:
        for node in part.find_nodes(op="call_function", target=shielded):
            node.replace_all_uses_with(node.args[0])
            part.erase_node(node)
