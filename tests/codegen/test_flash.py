"""Flash forward under the interpreter: out and log-sum-exp against float64, for every rule and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.codegen.gpu_flash import plain_scale, widths
from attnc.codegen.gpu_tables import block_lists
from attnc.codegen.tiles import classify
from attnc.errors import LoweringError, UsageError
from attnc.expr_text import parse
from attnc.forms import parse_form, spell_attention
from attnc.forms.flash import Flash
from attnc.op_flash import parse_flash
from attnc.rule_attention import AttentionRule
from tests.codegen.flash_cases import CASES, SMALL, WIDE, Shape, call_of, tolerance
from tests.codegen.interpreter import mend
from tests.tolerance import error

mend()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TABLE = replace(SMALL, skip="table")

# Every rule once, every other setting several times, in pairs.
PAIRS = [
    ("full", Shape(70, 33, BF16, E=24, Ev=48)),
    ("full", Shape(1, 200, FP16, Hq=4, H=1)),
    ("negative_scale", Shape(33, 70)),
    ("causal", Shape(70, 70, FP16, Hq=4, H=2, E=16, Ev=32)),
    ("causal_with_cache", Shape(33, 70, BF16, Hq=4, H=2)),
    ("causal_with_cache", Shape(70, 33, FP32, Hq=1, H=1)),
    ("causal_with_cache", Shape(1, 70, FP32)),
    ("window", Shape(70, 70, BF16, E=32)),
    ("documents", Shape(70, 70, FP32, B=2, Hq=1, H=1)),
    ("prefix", Shape(33, 33, FP16, B=2)),
    ("padded", Shape(33, 33, FP32, B=2, Hq=2, H=1)),
    ("softcap", Shape(33, 33, BF16)),
    ("alibi", Shape(33, 33, FP32, Hq=4, H=2)),
    ("relative_table", Shape(33, 70, BF16)),
    ("bias_strided", Shape(33, 33, FP16)),
    ("bias_broadcast", Shape(1, 33, FP32, B=2)),
    ("bias_of_keys", Shape(33, 33, FP32, B=2, Hq=1, H=1)),
    ("sink", Shape(70, 70, BF16, Hq=4, H=2)),
    ("sink_of_rows", Shape(33, 33, FP32, B=2)),
    ("rows_without_keys", Shape(33, 33, FP16)),
    ("rows_with_a_sink_alone", Shape(33, 33, FP32)),
]


def check_forward(name: str, x: Shape, knobs: Flash) -> None:
    call = call_of(name, x)
    with torch.no_grad():
        out, lse = call.run(knobs)
        want, want_lse = call.double().wanted()
    assert out.dtype == x.dtype and lse.dtype == torch.float32
    assert error(out, want) <= tolerance(x.dtype)
    assert error(lse, want_lse) <= 1e-5


@pytest.mark.parametrize(("name", "x"), PAIRS, ids=str)
def test_out_and_lse_are_those_of_float64(name, x, poisoned_memory):
    check_forward(name, x, SMALL)


def test_every_rule_is_tried():
    assert {name for name, _ in PAIRS} == set(CASES)


HEADS = ((2, 2, 16, 16), (4, 2, 40, 16), (3, 1, 64, 80))
LENGTHS = ((1, 1), (1, 70), (33, 33), (33, 200), (70, 33), (200, 200))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", list(enumerate(LENGTHS)), ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_out_and_lse_over_the_whole_table(name, dtype, lengths, poisoned_memory):
    # Each heads with each knobs twice in the lengths of a rule and type.
    turn, (L, S) = lengths
    for n, heads in enumerate(HEADS):
        check_forward(name, Shape(L, S, dtype, *heads, B=2), (SMALL, TABLE, WIDE)[(n + turn) % 3])


@pytest.mark.parametrize("E, Ev", [(8, 80), (96, 16), (192, 64), (72, 24), (256, 16)])
def test_any_width_up_to_256(E, Ev, poisoned_memory):
    check_forward("causal", Shape(17, 17, FP32, Hq=1, H=1, E=E, Ev=Ev), SMALL)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_inputs_of_eight_bits_give_bfloat16(dtype):
    call = call_of("causal", Shape(33, 33, dtype, E=32))
    out, lse = call.run(SMALL)
    want, want_lse = call.double().wanted()
    assert out.dtype == BF16
    assert error(out, want) <= tolerance(BF16)
    assert error(lse, want_lse) <= 1e-5


def test_out_lies_in_memory_as_the_query_does():
    out, _ = call_of("full", Shape(1, 17, E=16, Ev=32)).run(SMALL)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["causal", "documents", "window", "rows_without_keys", "padded"])
def test_tables_visit_what_ranges_visit(name, poisoned_memory):
    call = call_of(name, Shape(70, 70, FP32, B=2, Hq=2, H=1))
    for one, two in zip(call.run(SMALL), call.run(TABLE), strict=True):
        assert error(one, two) <= 1e-6


def test_a_list_holds_masked_tiles_then_full_ones():
    tiles = classify(parse("j <= i and i - j <= 100"), 70, 70, 16, 32)
    for by_keys in (False, True):
        lists = block_lists(tiles, 70, 70, by_keys=by_keys)
        may, must = (t.mT if by_keys else t for t in (tiles.may, tiles.must))
        for row in range(may.shape[-2]):
            masked, full = lists.counts[0, 0, row].tolist()
            order = lists.order[0, 0, row].tolist()
            assert sorted(order[: masked + full]) == may[0, 0, row].nonzero().flatten().tolist()
            inside = [n for n in range(may.shape[-1]) if must[0, 0, row, n]]
            assert set(order[masked : masked + full]) <= set(inside)
            # What is kept whole but reaches beyond the lengths is masked.
            assert all((n + 1) * (16 if by_keys else 32) <= 70 for n in order[masked : masked + full])


@pytest.mark.parametrize(
    ("width", "parts"), [(64, (64, 0)), (192, (128, 64)), (80, (64, 16)), (96, (64, 32)), (72, (64, 16)), (8, (16, 0)),
                         (24, (32, 0)), (112, (128, 0)), (256, (256, 0)), (1, (16, 0))],
)  # fmt: skip
def test_widths_are_a_power_of_two_and_a_tail(width, parts):
    assert widths(width) == parts


def test_scores_that_are_more_than_a_scale_go_through_the_hole():
    known = {"score=0.5 * s": 0.5, "score=-0.5 * s": 0.0, "score=s + 1.0": 0.0}
    assert {text: plain_scale(AttentionRule.parse(text)) for text in known} == known


def test_spellings_read_back():
    rule = AttentionRule.parse(CASES["prefix"].rule)
    assert parse_flash(spell_attention(TABLE, rule)) == (TABLE.schedule, rule)
    assert parse_form("flash") == parse_form("flash{}") == Flash()


@pytest.mark.parametrize(
    "text", ["flash{block_m=x}", "flash{blocks=1}", "flash{skip=some}", "flash(1)", "flash{",
             "flash{block_m=-1}", "flash{precision=int8}"],
)  # fmt: skip
def test_other_knobs_are_refused_with_a_sentence(text):
    with pytest.raises(UsageError, match="flash"):
        parse_form(text)
    with pytest.raises(UsageError, match=r"found no ' \| '"):
        parse_flash(text)


def test_another_form_is_refused_with_a_sentence():
    with pytest.raises(UsageError, match="found the form dense, allowed is flash"):
        parse_flash("dense | score=s")


def test_a_rule_with_dropout_is_refused():
    call = call_of("full", Shape(1, 1))
    with pytest.raises(LoweringError, match="dropout"):
        torch.ops.attnc.flash(call.query, call.key, call.value, [], [], "flash | score=s; dropout=0.1")
