"""What is in each graph of a model: its regions, and the names that a plan and a calibration give them.

A module or function is run once through torch.compile with a private backend that reads each graph and runs it as it
is; an exported program is read without running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from attnc.observe import as_written, name_of, observed
from attnc.options import Options
from attnc.passes.pipeline import analyse
from attnc.probes import identities
from attnc.region import Region
from attnc.report import Report


class Named(NamedTuple):
    """A region, its name in a plan, and its identity in every run of the model."""

    name: str
    identity: str
    region: Region


def graphs_of(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options, verb: str = "explain"
) -> list[tuple[str, Report]]:
    """What is in each graph of the model, with the place of the graph in it. verb: what is asked, for errors."""
    if isinstance(model, torch.export.ExportedProgram):
        inputs = [node.meta.get("val") for node in model.graph_module.graph.nodes if node.op == "placeholder"]
        return [("", _read(model.graph_module, inputs, options))]
    model = as_written(model, verb)
    reports: list[tuple[str, Report]] = []

    def read(gm: fx.GraphModule, example_inputs: Sequence[Any], place: str) -> Callable[..., Any]:
        reports.append((place, _read(gm, example_inputs, options)))
        return gm.forward

    with observed(model, read) as run:
        run(args, kwargs, f"{verb} {name_of(model)} on the given inputs")
    return reports


def named_regions(graphs: Sequence[tuple[str, Sequence[Region]]]) -> list[Named]:
    """The regions of graphs, each with its place: by the path that the backend sees, or the key where paths repeat."""
    regions = [region for _, regions in graphs for region in regions]
    paths = Counter(region.path for region in regions)
    names = [region.path if paths[region.path] == 1 else region.key for region in regions]
    return [Named(*found) for found in zip(names, identities(graphs), regions, strict=True)]


def _read(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Report:
    found = analyse(gm, example_inputs, options)
    return Report(
        tuple(found.regions),
        tuple(found.unmatched),
        tuple(found.problems),
        found.timings,
        notes=tuple(found.notes),
        graphs=1,
    )
