"""Reports as JSON: what stands for a region, and the schema of the whole; `attnc.report` explains its fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from attnc.region import KINDS, Choice, Region

SCHEMA_ID = "attnc.report/2"
# Fields of a choice that reports of this schema were written without at first.
LATER = ("error", "low_s", "high_s", "row_error", "mass", "kept", "pays_from")
# Of an attention; what a report does not tell is the default.
LATER_FACTS = ("value_in_key", "stored", "weights", "tiles_kept", "crosses")
_TEXTS = ("kind", "path", "node", "dtype", "device", "written")


def region_content(region: Region) -> dict[str, object]:
    """A region as JSON values; `region_of` reads it back."""
    choice = region.choice
    return {
        **{name: getattr(region, name) for name in (*_TEXTS, "training", "flops", "bytes")},
        "rule": region.rule.spell(),
        "shape": asdict(region.shape),
        "facts": region.facts,
        "choice": choice and {**asdict(choice), "rewrites": choice.rewrites, "speedup": speedup(choice)},
    }


def region_of(content: Mapping[str, object]) -> Region:
    """The region whose `region_content` is given. Raises: KeyError, TypeError, ValueError where it is none."""
    given: dict = dict(content)
    choice, facts = given["choice"], given["facts"]
    rule, shape, region = KINDS[given["kind"]]
    names = {f.name for f in fields(region)} - {f.name for f in fields(Region)}
    told = [name for name in names if name in facts or name not in LATER_FACTS]
    own: dict[str, Any] = {n: tuple(facts[n]) if isinstance(facts[n], list) else facts[n] for n in told}
    parsed = rule.parse(given["rule"])
    return region(
        **{name: given[name] for name in _TEXTS if name != "kind"},
        rule=parsed,
        shape=shape(**given["shape"]),
        training=given["training"],
        choice=choice and _choice_of(choice),
        **own,
    )


def _choice_of(content: Mapping[str, Any]) -> Choice:
    names = [f.name for f in fields(Choice) if f.name in content or f.name not in LATER]
    return Choice(**{name: content[name] for name in names})


def speedup(choice: Choice | None) -> float | None:
    """Predicted time as written over predicted time of the chosen form; None where either is unknown."""
    if choice is None or not choice.predicted_s or not choice.written_s:
        return None
    return choice.written_s / choice.predicted_s


def finite(value: object) -> object:
    """`value` with null for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(**properties: object) -> dict[str, object]:
    return {"type": "object", "required": sorted(properties), "properties": properties}


def _array(items: object) -> dict[str, object]:
    return {"type": "array", "items": items}


_TEXT, _FLAG, _NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": ["number", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS_BY_NAME = {"type": "object", "additionalProperties": _TEXT}
_COUNTS_BY_NAME = {"type": "object", "additionalProperties": _COUNT}
_CHOICE = _object(
    **dict.fromkeys(("form", "reason"), _TEXT),
    **dict.fromkeys(("predicted_s", "written_s", "speedup"), _NUMBER),
    rewrites=_FLAG,
    refused=_TEXTS_BY_NAME,
    offers={"type": "object", "additionalProperties": {"type": "number"}},
)
_CHOICE["properties"] |= dict.fromkeys(LATER, _NUMBER)  # type: ignore[operator]
_REGION = _object(
    **dict.fromkeys((*_TEXTS, "rule"), _TEXT) | {"kind": {"enum": list(KINDS)}},
    **dict.fromkeys(("flops", "bytes"), _COUNT),
    training=_FLAG,
    shape={"type": "object", "required": ["symbols"], "properties": {"symbols": _TEXTS_BY_NAME}},
    facts={"type": "object"},
    choice={**_CHOICE, "type": ["object", "null"]},
)
_COUNTS = _object(
    **dict.fromkeys(("regions", "rewritten", "unmatched"), _COUNT),
    **dict.fromkeys(("kinds", "forms", "masks", "written"), _COUNTS_BY_NAME),
)

# JSON Schema of what `Report.to_json` writes; what the fields mean stands at the top of this file.
SCHEMA: dict[str, object] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": SCHEMA_ID,
    **_object(
        schema={"const": SCHEMA_ID},
        **dict.fromkeys(("attnc", "model", "device"), _TEXT),
        graphs=_COUNT,
        regions=_array(_REGION),
        unmatched=_array(_object(**dict.fromkeys(("anchor", "reason", "node", "path"), _TEXT))),
        problems=_array(_TEXT),
        notes=_array(_TEXT),
        timings={"type": "object", "additionalProperties": {"type": "number"}},
        counts=_COUNTS,
    ),
}
