"""The report: folding, the table at two widths, JSON there and back, merging."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from attnc.errors import ArtifactError
from attnc.expr import FLOAT, load, unary, var
from attnc.folding import fold_paths
from attnc.predicate import le
from attnc.region import AS_WRITTEN, AttentionRegion, Choice, Unmatched
from attnc.report import Report
from attnc.report_json import SCHEMA, SCHEMA_ID
from attnc.report_text import fold_regions
from attnc.rule_attention import AttentionRule, AttentionShape

CHOICE = Choice(
    "block_sparse{block_m=128}",
    "predicted 2.0x faster than as written on cpu",
    predicted_s=0.01,
    written_s=0.02,
    refused={"dense": "dense visits every pair, found 12% of them kept, use block_sparse."},
)
RULE = AttentionRule(keep=le(var("j"), var("i")), empty="never")


def region(layer: int = 0, **changes: object) -> AttentionRegion:
    made = AttentionRegion(
        path=f"model.layers.{layer}.self_attn",
        node=f"softmax_{layer}",
        rule=RULE,
        shape=AttentionShape(B=2, Hq=8, H=2, L=70, S=70, E=16, Ev=16),
        dtype="float32",
        device="cpu",
        mask="causal",
        choice=CHOICE,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def report(**changes: object) -> Report:
    made = Report(
        regions=tuple(region(layer) for layer in range(32)),
        unmatched=(Unmatched("softmax_40", "the scores are used twice", "matmul_7", "model.head"),),
        problems=("retrace the graph to ATen: found an unknown node. Leave it out.",),
        timings={"capture": 0.25, "lift": 0.5},
        graphs=1,
        model="Llama",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def squeezed(text: str) -> str:
    """What a table says, without its frame and line breaks; columns that share a line stay mixed."""
    return "".join(text.replace("|", " ").split())


@pytest.mark.parametrize(
    ("paths", "folded"),
    [
        ([], []),
        (["a.b"], ["a.b"]),
        (["a.b", "a.b"], ["a.b x2"]),
        ([f"layers.{i}.attn" for i in range(32)], ["layers.{0-31}.attn x32"]),
        ([f"layers.{i}.attn" for i in (0, 2, 4, 6)], ["layers.{0-6/2}.attn x4"]),
        ([f"layers.{i}.attn" for i in (0, 1, 2, 6, 7, 9)], ["layers.{0-2,6-7,9}.attn x6"]),
        (["enc.0.a", "enc.1.a", "dec.0.a", "dec.1.a"], ["enc.{0-1}.a x2", "dec.{0-1}.a x2"]),
        ([f"s.{i}.b.{j}.a" for i in range(2) for j in range(3)], ["s.{0-1}.b.{0-2}.a x6"]),
        (["s.0.b.0.a", "s.0.b.1.a", "s.1.b.0.a"], ["s.0.b.{0-1}.a x2", "s.1.b.0.a"]),
        ([f"layers.{i}.attn" for i in (0, 0, 1, 1)], ["layers.{0-1}.attn x4"]),
    ],
)
def test_paths_fold_into_patterns(paths, folded):
    assert fold_paths(paths) == folded


def test_only_regions_of_equal_facts_and_choice_share_a_row():
    other_mask = region(1, mask="window")
    other_choice = region(2, choice=Choice(AS_WRITTEN, "it does not pay"))
    other_rule = region(3, rule=AttentionRule(score=unary("tanh", RULE.score), keep=RULE.keep))
    groups = fold_regions([region(0), other_mask, other_choice, other_rule, region(4)])
    assert [[r.path.split(".")[2] for r in group] for group in groups] == [["0", "4"], ["1"], ["2"], ["3"]]


@pytest.mark.parametrize("width", [80, 160])
def test_a_table_fits_its_width_and_loses_nothing(width):
    text = report().to_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.isascii()
    said = squeezed(text)
    for part in ("2.00x", "5.02 M", "total: 32 regions, 32 rewritten", "640 ms as written, 320 ms as chosen"):
        assert squeezed(part) in said, part
    for part in ("capture 0.250, lift 0.500", "problem: retrace the graph", "not recognised: 1", "causal x32"):
        assert squeezed(part) in said, part
    for word in ("causal", "attention", "8/2", "float32", "{0-31}", "x32", "matmul_7", "twice", "predicted", "12%"):
        assert word in said, word


def test_reasons_stand_beside_a_wide_table_and_under_a_narrow_one():
    reason = "1: predicted 2.0x faster than as written on cpu"
    assert reason in report().to_text(80)
    assert reason not in report().to_text(160)
    assert "| why" in report().to_text(160)


def test_a_measured_error_and_an_interval_show_where_they_are_known():
    known = report(regions=(region(choice=replace(CHOICE, error=0.0125, low_s=0.008, high_s=0.016)),))
    said = squeezed(known.to_text(200))
    assert squeezed("block_sparse{block_m=128}, error 0.0125") in said
    assert "2.00x" in said and "10ms" in said and squeezed("(8 to 16)") in said
    assert squeezed("10 ms (8 to 16) as chosen") in said
    assert max(map(len, known.to_text(80).splitlines())) <= 80
    assert "error" not in report(problems=()).to_text(200)
    assert Report.from_json(known.to_json()) == known


def test_a_report_from_before_errors_and_intervals_reads():
    content = json.loads(report().to_json())
    for part in content["regions"]:
        for name in ("error", "low_s", "high_s"):
            del part["choice"][name]
    assert Report.from_json(json.dumps(content)) == report()


def test_every_letter_of_a_long_reason_is_printed():
    reason = (
        "block_sparse{provider=flex,block_m=128,block_n=128,stages=3}: " + "abcdefghijklmnopqrstuvwxyz0123456789" * 5
    )
    lines = (
        report(regions=(region(choice=Choice("dense", reason)),), unmatched=(), problems=()).to_text(120).splitlines()
    )
    rows = [line.rpartition("|")[2] for line in lines if line.count("|") == 8]
    assert squeezed(reason) in squeezed("".join(rows))


def test_rich_and_print_say_the_same():
    console = Console(width=160, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report())
    assert [line.rstrip() for line in console.export_text().splitlines()] == report().to_text(160).splitlines()
    assert "Llama on cpu, 1 graph" in str(report())


def test_names_with_brackets_are_no_markup():
    assert "(softmax[bold])" in report(regions=(region(path="", node="softmax[bold]"),)).to_text(160)


def test_symbolic_lengths_and_facts_show():
    shape = AttentionShape(B=1, Hq=4, H=4, L=33, S=70, E=24, Ev=16, symbols={"L": "s0"})
    text = squeezed(report(regions=(region(shape=shape, mask="none", training=True, choice=None),)).to_text(200))
    for part in ("full attention", "s0=33 x 70", "heads 4", "E 24/16", "training", "not chosen"):
        assert squeezed(part) in text, part


def test_an_empty_report_says_so():
    text = Report().to_text(80)
    assert "no region found" in text
    assert "attnc's own time: 0.000 s" in text


def test_counts_add_up():
    counts = report(regions=(region(0), region(1, choice=Choice(AS_WRITTEN, "no")), region(2, choice=None))).counts()
    assert counts == {
        "regions": 3,
        "rewritten": 1,
        "unmatched": 1,
        "kinds": {"attention": 3},
        "forms": {CHOICE.form: 1, AS_WRITTEN: 1, "not chosen": 1},
        "masks": {"causal": 3},
        "written": {"composed": 3},
    }


def test_merging_keeps_regions_in_order_and_adds_times():
    first, second = report(regions=(region(0),)), report(regions=(region(1),), timings={"lift": 1.0}, model="")
    merged = Report.merge([first, second])
    assert [r.node for r in merged.regions] == ["softmax_0", "softmax_1"]
    assert merged.timings == {"capture": 0.25, "lift": 1.5}
    assert (merged.graphs, merged.model, len(merged.unmatched)) == (2, "Llama", 2)
    assert merged.problems == first.problems
    assert Report.merge([]) == Report()
    assert Report.merge([first]) == first


ROUND_TRIPS = {
    "many layers": report(),
    "nothing": Report(),
    "no choice": report(regions=(region(choice=None, captured=("bool[2, 70]",), training=True),)),
    "symbols": report(regions=(region(shape=replace(region().shape, symbols={"L": "s0", "S": "s0"})),)),
    "sink, dropout, softcap": report(
        regions=(
            region(
                rule=AttentionRule(
                    score=unary("tanh", RULE.score),
                    keep=RULE.keep,
                    sink=load(0, (var("h"),), FLOAT),
                    dropout=0.25,
                    empty="mean",
                )
            ),
        )
    ),
    "empty rows without a mask": report(regions=(region(rule=AttentionRule(empty="zero")),)),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_json_follows_its_schema_and_reads_back(case):
    made = ROUND_TRIPS[case]
    text = made.to_json()
    assert list(violations(json.loads(text), SCHEMA)) == []
    assert Report.from_json(text) == made


def test_json_holds_costs_facts_and_choice():
    content = json.loads(report().to_json())
    first = content["regions"][0]
    assert content["schema"] == SCHEMA_ID == "attnc.report/2"
    assert first["flops"] == 2 * 2 * 8 * 70 * 70 * 32
    assert first["facts"]["mask"] == "causal"
    assert AttentionRule.parse(first["rule"]) == RULE
    assert first["choice"]["speedup"] == 2.0
    assert first["choice"]["rewrites"] is True
    assert first["choice"]["refused"] == dict(CHOICE.refused)


def test_a_number_that_is_not_finite_is_null():
    endless = report(regions=(region(choice=Choice("dense", "why", predicted_s=1.0, written_s=float("inf"))),))
    assert json.loads(endless.to_json())["regions"][0]["choice"]["written_s"] is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"schema": "attnc.report/9"}', '{"schema": "attnc.report/1"}']
)
def test_what_is_no_report_is_refused_in_a_sentence(text):
    with pytest.raises(ArtifactError, match=r"read a report: found .* allowed is JSON that follows attnc.report/2"):
        Report.from_json(text)


def test_a_planted_violation_of_the_schema_is_seen():
    content = json.loads(report().to_json())
    del content["regions"][3]["choice"]["reason"]
    content["graphs"] = "one"
    assert {path for path, _ in violations(content, SCHEMA)} == {"$.regions.3.choice", "$.graphs"}


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def violations(value, schema, path="$"):
    """The part of JSON Schema that `SCHEMA` uses."""
    if "const" in schema and value != schema["const"]:
        yield path, f"is not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield path, "is not in the list"
    allowed = schema.get("type", [])
    allowed = [allowed] if isinstance(allowed, str) else allowed
    if allowed and not any(isinstance(value, TYPES[name]) for name in allowed):
        yield path, f"is no {allowed}"
    elif isinstance(value, dict):
        for name in schema.get("required", []):
            if name not in value:
                yield path, f"has no {name}"
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, item in value.items():
            yield from violations(item, known.get(name, others), f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{path}.{index}")
