"""Forms that choose blocks: what they refuse, where they are exact, and gates that the user supplies."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attnc
from attnc.expr_text import parse
from attnc.forms import parse_form
from attnc.forms.selected import is_prefix
from attnc.operands import Operands
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.forms.rules import Dims, inputs, rule_of

GATES = {"gate_query": (4, 16, 8), "gate_key": (2, 48, 8)}


def region(rule: str = "causal", L: int = 512, S: int = 512, **facts) -> AttentionRegion:
    facts = {"written": "sdpa", "dtype": "float32", "device": "cpu", **facts}
    return AttentionRegion("layer", "sdpa", rule_of(rule, Dims(L, S)), AttentionShape(1, 4, 2, L, S, 16, 16), **facts)


@pytest.mark.parametrize(
    ("spelling", "where", "says"),
    [
        ("block_scores{window=0}", region(), "use window=1"),
        ("page_bounds", region(), "serves decode, found prefill"),
        ("page_bounds{sinks=16}", region("window", 1), "may choose no key"),
        ("memory_blocks", region(L=1), "serves prefill and training, found decode"),
        ("memory_blocks", region("plain", L=64), "64 queries of 512 keys"),
        ("compressed_selection{length=48,stride=32}", region(), "whole strides"),
        ("rectified", region("window"), "a causal mask or none"),
        ("rectified", region("alibi"), "scores the product alone"),
        ("gated_blocks", region(), "needs weights gate_query (Hq, E, G) = (4, 16, G)"),
        ("gated_blocks", region(weights=(("gate_query", (4, 16, 8)), ("gate_key", (2, 48, 4)))), "found"),
    ],
)
def test_a_refusal_is_a_sentence(spelling: str, where: AttentionRegion, says: str) -> None:
    why = parse_form(spelling).refuse(where)
    assert why is not None and says in why and why.endswith(".")


@pytest.mark.parametrize(
    ("spelling", "where"),
    [
        ("block_scores", region()),
        ("block_scores{window=0}", region("plain")),
        ("page_bounds", region(L=1)),
        ("page_bounds{window=1}", region("window", L=1)),
        ("memory_blocks", region()),
        ("compressed_selection{length=32,stride=16}", region()),
        ("rectified", region()),
        ("gated_blocks", region(weights=tuple(GATES.items()))),
    ],
)
def test_its_neighbour_applies(spelling: str, where: AttentionRegion) -> None:
    assert parse_form(spelling).refuse(where) is None


@pytest.mark.parametrize(
    ("few", "all_of_them"),
    [
        ("block_mixture{block=64,top_k=7}", "block_mixture{block=64,top_k=8}"),
        ("block_mixture{block=64,top_k=8,mass=90}", "block_mixture{block=64,top_k=8,mass=100}"),
        ("block_scores{block=64,top_k=8,mass=90}", "block_scores{block=64,top_k=8}"),
        ("compressed_selection{top_k=7,window=1}", "compressed_selection{top_k=8}"),
        ("memory_blocks{top_k=3,window=64,sinks=0}", "memory_blocks{top_k=4}"),
    ],
)
def test_they_are_exact_where_they_keep_everything(few: str, all_of_them: str) -> None:
    assert not parse_form(few).is_exact(region()) and parse_form(all_of_them).is_exact(region())


def test_a_prefix_is_a_bound_of_positions_alone() -> None:
    assert is_prefix(parse("j <= i")) and is_prefix(parse("j - i <= 7"))
    assert not is_prefix(parse("j <= i and i - j <= 9")) and not is_prefix(parse("t0[b, i] == t0[b, j] and j <= i"))


def test_knobs_that_change_nothing_are_not_tried_twice() -> None:
    assert not parse_form("block_scores{pick=head}").is_distinct and parse_form("block_scores").is_distinct
    assert not parse_form("block_scores{stride=8}").is_distinct
    assert parse_form("block_scores{pool=antidiagonal,stride=8}").is_distinct


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def test_a_model_runs_with_the_gate_that_the_user_supplies() -> None:
    qkv, _ = inputs(Dims(70, 70, 4, 2), torch.float32, grad=False)
    weights = {name: torch.randn(shape) for name, shape in GATES.items()}
    spelling = "gated_blocks{rows=16,block=16,top_k=3}"
    found = attnc.explain(attend, *qkv)
    options = {"allow": ["gated_blocks"], "force": spelling, "inner": "aot_eager", "strict": True}
    path = found.regions[0].path or found.regions[0].key
    fast = torch.compile(attend, backend="attnc", options={**options, "weights": {path: weights}})
    with torch.no_grad():
        out = fast(*qkv)
    assert attnc.last_report(fast).regions[0].choice.name == "gated_blocks"
    form, rule = parse_form(spelling), AttentionRule.parse("score=0.25 * s; keep=j - i <= 0")
    expected, _ = form.reference(Operands(*qkv, form.tensors(16, weights), [], rule))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
