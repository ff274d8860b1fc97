"""Forms that choose keys at run time against the original authors' vectors (shared/golden), in float64.

Outputs, gradients with the choice as a constant, and what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ops
from attnc.forms import parse_form
from attnc.forms.selected import Selected
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule

CAUSAL = "score=0.25 * s; keep=j - i <= 0"


def _plain(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return CAUSAL


def _decoded(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Rows at the last positions of the keys."""
    return f"score=0.25 * s; keep=j - i <= {tensors['k'].shape[2] - tensors['q'].shape[2]}"


def _pages(options: Mapping[str, Any]) -> str:
    pages = max(3, options["token_budget"] // options["chunk_size"])
    return f"page_bounds{{block={options['chunk_size']},top_k={pages}}}"


def _lines(options: Mapping[str, Any]) -> str:
    columns, diagonals = max(30, options["vertical_size"]), max(50, options["slash_size"])
    return f"vertical_slash{{columns={columns},diagonals={diagonals},last={options['last_q']}}}"


# file -> (spelling from the options, rule, names of captured tensors)
FILES: dict[str, tuple[Callable[[Mapping[str, Any]], str], Callable[..., str], tuple[str, ...]]] = {
    **dict.fromkeys(
        ("moba/n64_c16_k2_grad", "moba/n200_c32_k3"),
        (lambda o: f"block_mixture{{block={o['chunk']},top_k={o['topk']}}}", _plain, ()),
    ),
    **dict.fromkeys(("quest_decode/n128_c16_b64", "quest_decode/n200_gqa_c8_b40"), (_pages, _decoded, ())),
    **dict.fromkeys(
        ("minference_vertical_slash/n160_v40_s60", "minference_vertical_slash/n200_v30_s50"), (_lines, _plain, ())
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_golden_vectors_are_reproduced(name: str, golden) -> None:
    file = golden(name)
    spelled, ruled, captured_names = FILES[name]
    form, rule = parse_form(spelled(file.options)), AttentionRule.parse(ruled(file.options, file.tensors))
    assert isinstance(form, Selected)
    assert rule.scale == pytest.approx(float(file.options["scale"]), rel=1e-5)
    held = {n: wide(file.tensors[n]) for n in ("q", "k", "v", *captured_names)}
    leaves = {n: t.requires_grad_() for n, t in held.items() if f"grad_{n}" in file.tensors}
    q, k, v, *captured = held.values()
    out, _ = ops.attention(q, k, v, captured, [], ops.spell_attention(form, rule))
    assert off(out, file.outputs["out"]) < 2e-7
    if "mask" in file.outputs:
        given = Operands(q, k, v, captured, [], rule)
        narrowed = form.narrowed(form.choose(given), given)
        assert torch.equal(narrowed.tensor(narrowed.rule.keep), file.outputs["mask"].bool())
    if leaves:
        grads = torch.autograd.grad(out, list(leaves.values()), file.tensors["cot_out"].double())
        for given_name, grad in zip(leaves, grads, strict=True):
            assert off(grad, file.tensors[f"grad_{given_name}"]) < 2e-7, given_name


@pytest.mark.parametrize("name", ["n64_1hash_causal_grad", "n96_2hash"])
def test_buckets_of_reformer_are_reproduced(name: str, golden) -> None:
    file = golden(f"reformer_lsh/{name}")
    shared, value = (file.tensors[n].double().requires_grad_() for n in ("qk", "v"))
    key = shared * (shared.square().mean(-1, keepdim=True) + 1e-6).rsqrt() / shared.shape[-1] ** 0.5
    form = (
        f"hash_buckets{{hash=given,chunk={file.options['chunk_length']},rounds={file.options['num_hashes']},window=0}}"
    )
    rule = "score=where(i == j, -100000.0, s)" + ("; keep=j - i <= 0" if file.options["causal"] else "")
    out, _ = ops.attention(shared, key, value, [file.tensors["buckets"]], [], f"{form} | {rule}")
    assert off(out, file.outputs["out"]) < 1e-8
    if "cot_out" in file.tensors:
        grads = torch.autograd.grad(out, [shared, value], file.tensors["cot_out"].double())
        assert off(grads[0], file.tensors["grad_qk"]) < 1e-8 and off(grads[1], file.tensors["grad_v"]) < 1e-8


def wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def off(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()
