"""Mixers written in chunks become one operator where that is proved; what is like them and is none stays as written."""

from __future__ import annotations

import pytest
import torch

import attnc
from attnc.passes.graph import GraphFacts, NoMatch
from attnc.passes.recurrence.asking import whole
from attnc.passes.recurrence.chunks import chunked, groups
from attnc.passes.recurrence.rows import stack_rows
from tests.gallery_recurrence import Mix, arguments
from tests.gallery_recurrence_chunks import BACKWARDS, CHUNKED, NOT_CHUNKED, TOGETHER
from tests.passes.recurrence.test_loops import captured
from tests.passes.recurrence.test_rewrite import assert_near, gradients, mixers, run

RUN = ("chunks_dual_with_states", "chunks_delta", "loop_backwards_in_rows", "both_directions")


def asked(fn, length: int) -> list:
    gm = captured(fn, *arguments(length))
    stack_rows(gm.graph)
    facts = GraphFacts(gm.graph)
    return [whole(facts, chunks) for chunks in chunked(facts, ())]


@pytest.mark.parametrize(("mix", "length"), CHUNKED, ids=lambda x: getattr(x, "name", None))
def test_a_mixer_in_chunks_is_proved_to_be_one_recurrence(mix: Mix, length: int) -> None:
    (found,) = asked(mix.fn, length)
    assert found, found
    rule = vars(found.rule) | {"state_in": "initial" in mix.facts, "state_out": len(found.outs) > 1}
    states = {"state_in", "state_out"}
    assert {x: rule[x] for x in mix.facts if x not in states} == {x: mix.facts[x] for x in mix.facts if x not in states}
    assert found.shape.L in (length, length + -length % 4)


@pytest.mark.parametrize(("fn", "length", "reason"), NOT_CHUNKED, ids=lambda x: getattr(x, "__name__", None))
def test_chunks_of_what_is_no_recurrence_are_refused(fn, length: int, reason: str) -> None:
    found = asked(fn, length)
    assert all(isinstance(x, NoMatch) for x in found)
    assert not reason or any(reason in x.reason for x in found), found


def equals_eager(mix: Mix, length: int, **options) -> attnc.Report:
    given = arguments(length)
    out, grads, report = run(mix.fn, given, **options)
    own = [x.clone().requires_grad_() for x in given]
    want = mix.fn(*own)
    assert_near([out, *grads], [want.detach(), *gradients(want, own)])
    return report


def cases() -> list:
    listed = [*CHUNKED, *((mix, 7) for mix in (*BACKWARDS, *TOGETHER))]
    slow = [pytest.mark.slow]
    return [pytest.param(m, n, id=m.name, marks=[] if m.name in RUN else slow) for m, n in listed]


@pytest.mark.parametrize(("mix", "length"), cases())
def test_it_runs_as_the_operator_and_equals_eager(mix: Mix, length: int) -> None:
    report = equals_eager(mix, length, strict=True)
    regions = mixers(report)
    assert len(regions) == mix.regions and all(r.choice.name in ("chunked", "scan", "step") for r in regions)
    assert {name: regions[0].facts[name] for name in mix.facts} == mix.facts
    assert report.problems == ()


def test_axes_of_two_shapes_are_matched_by_their_elements() -> None:
    assert groups([2, 12, 3], [2, 3, 4, 3]) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert groups([2, 3, 4, 1, 5], [2, 12, 1, 5]) == [([0], [0]), ([1, 2], [1]), ([3], [2]), ([4], [3])]
    assert groups([4, 3], [6, 2]) == [([0, 1], [0, 1])]


def test_a_cache_that_is_still_empty_is_no_chunk() -> None:
    def grown(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (torch.cat([torch.empty(0), x], -2) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(key, key, value, is_causal=True)

    compiled = torch.compile(grown, backend="attnc", options={"strict": True, "inner": "eager"})
    key, value = torch.randn(1, 2, 33, 8), torch.randn(1, 2, 33, 8)
    torch.testing.assert_close(compiled(key, value), grown(key, value))
