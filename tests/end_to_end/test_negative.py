"""Nothing that only looks like attention is rewritten wrongly: negatives, and mutants of the gallery."""
from __future__ import annotations

import copy

import pytest
import torch

import attnc
from tests.gallery import BY_NAME, GALLERY
from tests.gallery_mutations import BACKWARD, COARSE, mutants
from tests.gallery_negative import NEGATIVES
from tests.gallery_run import assert_same, attention, attnc_compiled, run

NEGATIVE_BY_NAME = {entry.name: entry for entry in NEGATIVES}
REPRESENTATIVE = ("sdpa_tril_mask", "product_matmul", "means_window", "gqa_expand_reshape")
# make_fx stops at FlexAttention, and what it traces inside vmap cannot be copied.
TRACED = [entry for entry in GALLERY if not entry.name.startswith(("flex_", "mask_by_vmap"))]
SWEPT = [entry for entry in TRACED if entry.name not in REPRESENTATIVE]


def named(entries):
    return [pytest.param(entry, id=entry.name) for entry in entries]


def compiled_as_written(model):
    """What is left as written is torch's own graph to any inner backend: eager is the quickest."""
    return attnc_compiled(model, inner="eager")


def check(entry):
    model, args = entry.make()
    want = run(model, args, entry.train)
    model, args = entry.make()
    compiled = compiled_as_written(model)
    assert_same(run(compiled, args, entry.train, named=model), want)
    return attnc.last_report(compiled)


def check_mutants(entry) -> None:
    """Each mutant computes through attnc what it computes eagerly; all that do not are named."""
    wrong = []
    for name, graph, args in mutants(entry):
        torch._dynamo.reset()
        backward, dtype = name in BACKWARD and entry.train, torch.bfloat16 if name in COARSE else None
        want = run(copy.deepcopy(graph), args, backward)
        try:
            assert_same(run(compiled_as_written(graph), args, backward, named=graph), want, dtype)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("entry", named(e for e in NEGATIVES if e.regions == 0))
def test_no_attention_is_seen_where_there_is_none(entry):
    report = check(entry)
    assert [region.facts for region in attention(report)] == []


@pytest.mark.parametrize("entry", named(e for e in NEGATIVES if e.regions is None))
def test_lookalike_equals_eager(entry):
    check(entry)


@pytest.mark.parametrize("name", ["softmax_over_queries", "softmax_over_heads", "product_elementwise"])
def test_softmax_that_is_no_attention_is_reported_with_a_reason(name):
    report = check(NEGATIVE_BY_NAME[name])
    assert any(item.anchor and len(item.reason.split()) > 3 for item in report.unmatched)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_mutants_equal_eager(name):
    check_mutants(BY_NAME[name])


@pytest.mark.slow
@pytest.mark.parametrize("entry", named(SWEPT))
def test_mutants_of_every_spelling_equal_eager(entry):
    check_mutants(entry)


@pytest.mark.parametrize("name", ["product_matmul", "apply_where", "sink_column"])
def test_mutants_differ_from_their_origin(name):
    """The mutator does change what is computed: most mutants do not give the original's values."""
    entry, changed, total = BY_NAME[name], 0, 0
    model, _ = entry.make()
    for _, graph, args in mutants(entry):
        want, got = run(model, args).outputs, run(graph, args).outputs
        total += 1
        same = len(want) == len(got) and want[0].shape == got[0].shape and torch.allclose(want[0], got[0])
        changed += not same
    assert changed >= 0.7 * total > 7
