"""The layers of the house, lowest first: a module imports from layers below its own; `attnc.x` covers `attnc.x.*`."""

from __future__ import annotations

LAYERS = {
    "attnc.expr": 0,
    "attnc.expr_text": 0,
    "attnc.reading": 0,
    "attnc.intervals": 0,
    "attnc.predicate": 0,
    "attnc.errors": 0,
    "attnc.rule": 1,
    "attnc.rule_attention": 1,
    "attnc.rule_ffn": 1,
    "attnc.rule_moe": 1,
    "attnc.rule_recurrence": 1,
    "attnc.region": 1,
    "attnc.options": 1,
    "attnc.codegen": 2,
    "attnc.cost_models": 2,
    "attnc.forms": 3,
    "attnc.plan": 4,
    "attnc.ops": 5,
    "attnc.op_recurrence": 5,
    "attnc.store": 5,
    "attnc.records": 5,
    "attnc.folding": 5,
    "attnc.report": 5,
    "attnc.report_json": 5,
    "attnc.report_text": 5,
    "attnc.reports": 5,
    "attnc.passes": 6,
    "attnc.tuning": 6,
    "attnc.distributed": 6,
    "attnc.backend": 7,
    "attnc.offline": 7,
    "attnc.artifact": 7,
    "attnc.commands": 8,
    "attnc.cli": 8,
    "attnc.__main__": 8,
    "attnc": 8,  # the face alone, not what it holds
}
NEIGHBOURS = {2, 6}  # layers whose rooms never import each other
