"""Kernels that walk lists of keys, under the interpreter: out, log-sum-exp and gradients against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnc import op_selected
from attnc.codegen import gpu_key_lists
from attnc.codegen.gpu_key_lists import ListKnobs, cut, of_choice, of_lists, sorted_rows
from attnc.codegen.key_lists import NONE, KeyLists
from attnc.forms import parse_form
from attnc.forms.masked import reference
from attnc.forms.selected import Selected
from attnc.operands import Operands
from tests.codegen.interpreter import mend
from tests.forms.rules import Dims, inputs, rule_of
from tests.tolerance import error, tol

mend()
BF16, FP32 = torch.bfloat16, torch.float32
SMALL = "kernel=32x16x4x2/16x32x4x2/32x16x4x2"

# A setting of each layout: rows sorted by block, groups with a list, tiles of rows, single keys, decoding, pooled keys.
LAYOUTS = {
    "sorted": "block_mixture{block=16,top_k=2",
    "grouped": "compressed_selection{block=8,window=9,top_k=3",
    "tiles": "block_scores{rows=16,block=8,top_k=3,share=group",
    "single": "token_top_k{top_k=5,share=group",
    "pages": "page_bounds{block=8,top_k=3",
    "pooled": "rectified{rows=16,block=8,top_k=2",
    "lines": "vertical_slash{columns=9,diagonals=12,last=16,sinks=2,window=4",
}
CASES = [
    ("sorted", "causal", Dims(33, 33, 2, 1, 16, 8), FP32),
    ("sorted", "bias", Dims(17, 17, 2, 1, 24, 16), BF16),
    ("grouped", "sink", Dims(9, 9, 8, 1), BF16),
    ("tiles", "documents", Dims(33, 33, 2, 1), FP32),
    ("single", "softcap", Dims(9, 9, 2, 1, 8, 24, B=1), FP32),  # one key head: tables are views of one number
    ("single", "alibi", Dims(5, 5, 4, 2), FP32),
    ("pages", "plain", Dims(1, 70, 4, 2), BF16),
    ("pooled", "causal", Dims(20, 20, 2, 1), FP32),
]


def form_of(layout: str) -> Selected:
    form = parse_form(f"{LAYOUTS[layout]},{SMALL}}}")
    assert isinstance(form, Selected)
    return form


def given_of(form: Selected, rule: str, dims: Dims, dtype: torch.dtype, *, grad: bool = False) -> Operands:
    qkv, captured = inputs(dims, dtype, grad=grad)
    return Operands(*qkv, captured, [], rule_of(rule, dims))


def check(form: Selected, given: Operands, chosen: torch.Tensor, *, train: bool = True) -> None:
    """Out, lse and gradients of the kernels against those of the formula in float64 with the same choice."""
    dtype = given.query.dtype
    exact = given.double()
    learned = [t.detach().requires_grad_() for t in (*exact[:3], *exact.captured) if t.is_floating_point()]
    rest = iter(learned[3:])
    captured = [next(rest) if t.is_floating_point() else t for t in exact.captured]
    exact = exact._replace(query=learned[0], key=learned[1], value=learned[2], captured=captured)
    want, want_lse = reference(form.narrowed(chosen, exact))
    out, lse = op_selected.walk(form, chosen, given)
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == FP32
    assert error(out, want) <= tol(dtype, 16) and error(lse, want_lse) <= 1e-5
    if not train:
        return
    slope = torch.randn_like(out)
    needs = [t.is_floating_point() for t in given.captured]
    found = op_selected.walk_backward(form, chosen, given, (out, lse), slope, needs)
    wanted = torch.autograd.grad(want, learned, slope.double(), allow_unused=True)
    for one, two in zip(found, wanted, strict=True):
        assert error(one, torch.zeros_like(one) if two is None else two) <= tol(dtype, 64)


@pytest.mark.parametrize(("layout", "rule", "dims", "dtype"), CASES, ids=str)
def test_lists_are_walked_as_the_formula_says(layout, rule, dims, dtype, poisoned_memory):
    form = form_of(layout)
    given = given_of(form, rule, dims, dtype)
    check(form, given, form.choose(given), train=dims.L > 1)


RULES = ("causal", "softcap", "sink", "documents")


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 33, 70, 200])
@pytest.mark.parametrize(("layout", "rule"), [x for x in itertools.product(LAYOUTS, RULES) if x[0] != "pooled"])
def test_every_layout_rule_length_and_type(layout, rule, length, poisoned_memory):
    form = form_of(layout)
    for Hq, E, Ev, dtype in ((2, 16, 16, FP32), (8, 40, 24, FP32), (2, 16, 16, BF16)):
        given = given_of(form, rule, Dims(length, length, Hq, 1, E, Ev), dtype)
        check(form, given, form.choose(given))


@pytest.mark.parametrize(("layout", "length"), [("single", 5), ("grouped", 9)])
def test_gradients_of_single_keys_and_of_blocks_that_many_choose_are_added_by_atomics(layout, length, monkeypatch):
    monkeypatch.setattr(gpu_key_lists, "SHARE", 16)  # rows of a program
    form = form_of(layout)
    given = given_of(form, "causal", Dims(length, length, 8, 1), FP32)
    check(form, given, form.choose(given))


def test_what_any_layout_gives_is_walked(poisoned_memory):
    """Rows sorted by block and a diagonal, as the CPU has them: kinds that take no mask beside those that do."""
    form = form_of("sorted")
    given = given_of(form, "causal", Dims(33, 33, 2, 1), FP32)
    chosen = form.choose(given)
    laid, every = form.laid(chosen, given)
    assert {"diagonal", "all"} <= {lists.keeps for lists in every}
    kernels, knobs = op_selected._kernels(laid, [False] * 4), ListKnobs(32, 16, dq_block_m=16, dkv_block_m=32)
    lists = [of_lists(one) for one in every]
    out, lse = gpu_key_lists.forward(kernels, laid, lists, knobs)
    want, want_lse = op_selected.walk(form, chosen, given)
    assert error(out, want) <= 1e-6 and error(lse, want_lse) <= 1e-6
    slope = torch.randn_like(out)
    found = gpu_key_lists.backward(kernels, laid, lists, knobs, (out, lse), slope, [False] * 4)[:3]
    wanted = op_selected.walk_backward(form, chosen, given, (out, lse), slope, [False] * 4)
    assert all(error(one, two) <= 2e-6 for one, two in zip(found, wanted, strict=True))


def test_a_long_list_of_few_rows_is_cut(poisoned_memory):
    form = parse_form("page_bounds{block=16,top_k=24,kernel=16x64x4x2}")
    given = given_of(form, "softcap", Dims(1, 400, 2, 1), FP32)
    chosen = form.choose(given)
    lists = of_choice(chosen, (2, 2, 1, 1), 1, 16, 400)
    assert cut(lists, 4, 16).parts == 3
    check(form, given, chosen, train=False)


@pytest.mark.parametrize("tile_m", [1, 4])
def test_nothing_waits_for_the_device(tile_m):
    chosen = torch.randint(-1, 5, (2, 4, 33, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for heads in (1, 2, 4):
            found = of_choice(mode.from_tensor(chosen[:, :heads]), (2, 4, 2, 33 * tile_m), tile_m, 16, 70, 32)
            assert found.counts.shape == found.place.shape == found.rows.shape[:1] == found.blocks.shape[:1]


def test_sorted_rows_hold_each_choice_once():
    B, Hq, H, L, blocks = 2, 4, 2, 33, 5
    chosen = torch.stack([torch.randperm(blocks)[:3] for _ in range(B * Hq * L)]).view(B, Hq, L, 3)
    chosen[torch.rand(chosen.shape) < 0.3] = NONE
    lists = sorted_rows(chosen, (B, Hq, H, L), blocks, 16, 8)
    assert lists.rows.shape == (B * Hq * L * 3 // 8 + B * H * blocks, 8)
    found = torch.full((3, B, Hq, L), NONE)
    for rows, (block,), place in zip(lists.rows.tolist(), lists.blocks.tolist(), lists.place.tolist(), strict=True):
        for row in (r for r in rows if r >= 0):
            assert place == row % (B * Hq * L) // (Hq * L) * H + row // L % Hq // (Hq // H)
            assert found.view(-1)[row] == NONE
            found.view(-1)[row] = block
    assert torch.equal(found, chosen.movedim(-1, 0))


def test_lists_end_with_their_last_block():
    rows = torch.zeros(4, 1, dtype=torch.int64)
    blocks = torch.tensor([[NONE, NONE, NONE], [2, NONE, NONE], [NONE, NONE, 0], [1, 2, 3]])
    assert of_lists(KeyLists(rows, blocks, rows[:, 0], 8)).counts.tolist() == [0, 1, 3, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "pages"])
def test_a_gpu_walks_lists_as_the_formula_says(layout):
    form = form_of(layout)
    given = given_of(form, "causal", Dims(200, 200, 8, 2, 64, 64), BF16).on("cuda")
    chosen = form.choose(given)
    check(form, given, chosen)
    run = torch.compile(lambda q: form.gpu(given._replace(query=q))[0])
    assert error(run(given.query), op_selected.walk(form, chosen, given)[0]) <= tol(BF16, 16)
