"""Forms that choose single keys: the authors' vectors, what they refuse, what they read, and when they pay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnc import ops
from attnc.codegen.selectors_tokens import best_keys, index_scores
from attnc.cost_models.device import device_named
from attnc.forms import parse_form, spell_attention
from attnc.forms.dense import Dense
from attnc.forms.selected import Selected
from attnc.operands import Operands
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.forms.rules import Dims, inputs, rule_of

CAUSAL = AttentionRule.parse("score=0.25 * s; keep=j - i <= 0")
CPU = device_named("cpu", 2)
INDEXER = ("q_idx", "k_idx", "w_idx")


def run(spelling: str, tensors: dict[str, Tensor], rule: AttentionRule, captured: tuple[str, ...] = ()):
    """The output, what was chosen, the kept pairs, and the tensors that have gradients."""
    form = parse_form(spelling)
    assert isinstance(form, Selected)
    held = {n: tensors[n].double() for n in ("q", "k", "v", *captured)}
    leaves = {n: t.requires_grad_() for n, t in held.items() if f"grad_{n}" in tensors}
    q, k, v, *more = held.values()
    given = Operands(q, k, v, more, [], rule)
    chosen = form.choose(given)
    narrowed = form.narrowed(chosen, given)
    out, _ = ops.attention(q, k, v, more, [], spell_attention(form, rule))
    return out, chosen, narrowed.tensor(narrowed.rule.keep), leaves


def settled(out: Tensor, tensors: dict[str, Tensor], leaves: dict[str, Tensor], slope: Tensor) -> None:
    for (name, _), grad in zip(leaves.items(), torch.autograd.grad(out, list(leaves.values()), slope), strict=True):
        assert off(grad, tensors[f"grad_{name}"]) < 2e-7, name


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("h2o_decode/n80_hh8_r16", "cache_eviction{heavy=8,recent=16}"),
        ("h2o_decode/n128_hh16_r16", "cache_eviction{heavy=16,recent=16}"),
        ("h2o_local_mask/n96_h12_r12", "cache_eviction{policy=h2o_local,heavy=12,recent=12}"),
    ],
)
def test_golden_evictions_are_reproduced(name: str, spelling: str, golden) -> None:
    tensors = golden(name).tensors
    out, _, keep, _ = run(spelling, tensors, CAUSAL)
    assert off(out, tensors["out"]) < 2e-7
    assert torch.equal(keep, tensors["mask"].bool())


@pytest.mark.parametrize(("name", "top_k"), [("n64_w16_grad", 16), ("n100_w24", 24)])
def test_golden_dynamic_masks_are_reproduced_with_gradients(name: str, top_k: int, golden) -> None:
    tensors = golden(f"dynamic_mask_attention/{name}").tensors
    group = tensors["q"].shape[1] // tensors["k"].shape[1]
    rule = AttentionRule.parse(
        f"score=0.25 * s + f0[b, {f'h // {group}' if group > 1 else 'h'}, i, j]; keep=j - i <= 0"
    )
    out, _, _, leaves = run(f"key_importance{{top_k={top_k}}}", tensors, rule, ("attn_bias",))
    assert off(out, tensors["out"]) < 2e-7
    if leaves:
        settled(out, tensors, leaves, tensors["cot_out"].double())


@pytest.mark.parametrize(("name", "top_k"), [("n64_k16_grad", 16), ("n200_k32", 32)])
def test_golden_indexed_attention_is_reproduced_up_to_ties(name: str, top_k: int, golden) -> None:
    """The relu gives many keys the same score, 0; where they tie at the last place the authors' sort takes any of them:
    such a row is given their choice, and has to have chosen keys of the same scores."""
    tensors = golden(f"dsa/{name}").tensors
    _, chosen, _, _ = run(f"token_top_k{{scorer=indexer,top_k={top_k}}}", tensors, CAUSAL, INDEXER)
    wanted, found = tensors["indices"].long(), chosen.squeeze(1)
    a, b, w = (tensors[n].double() for n in INDEXER)
    score = torch.nn.functional.pad(index_scores(a.transpose(1, 2), b, w), (1, 0), value=-torch.inf)
    ranked = [score.gather(-1, x + 1).sort(-1).values for x in (found, wanted)]
    torch.testing.assert_close(*ranked, rtol=0.0, atol=1e-12)
    same = (found.sort(-1).values == wanted.sort(-1).values).all(-1)  # (B, L)
    assert same.double().mean() > 0.9
    form = parse_form(f"token_top_k{{scorer=indexer,top_k={top_k}}}")
    q, k, v = (tensors[n].double().requires_grad_() for n in "qkv")
    given = Operands(q, k, v, [], [], CAUSAL)
    taken = torch.where(same[:, None, :, None], chosen, wanted.unsqueeze(1))
    narrowed = form.narrowed(taken, given)
    out, _ = ops.attention(*narrowed[:5], spell_attention("dense", narrowed.rule))
    assert off(out, tensors["out"]) < 2e-7
    mine, _ = ops.attention(q, k, v, [a, b, w], [], spell_attention(form, CAUSAL))
    rows = same[:, None, :, None].expand_as(mine)
    torch.testing.assert_close(mine[rows], out[rows], rtol=1e-10, atol=1e-12)
    if "cot_out" in tensors:
        settled(out, tensors, {"q": q, "k": k, "v": v}, tensors["cot_out"].double())


def test_ties_go_to_the_earlier_key() -> None:
    score = torch.tensor([3.0, 1.0, 5.0, 1.0, 1.0]).view(1, 1, 1, -1)
    kept = torch.tensor([True, True, True, True, False])
    own = torch.tensor([[[4]]])
    assert best_keys(score, kept, 3, own=own).tolist() == [[[[0, 1, 2]]]]
    assert best_keys(score, kept, 5, own=own).tolist() == [[[[0, 1, 2, 3, -1]]]]
    assert best_keys(score, kept, 2, own=own, window=2).tolist() == [[[[2, 3]]]]


def test_an_indexer_reads_no_later_key() -> None:
    qkv, captured = inputs(Dims(70, 70, 4, 2), grad=False)
    index = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 70, 4), (2, 70, 4), (2, 70, 3))]
    for more in ("", "blocks=3,block=8", "heads=2,block=8"):
        form = parse_form(f"token_top_k{{scorer=indexer,top_k=9,{more}}}")
        before = form.choose(Operands(*qkv, captured + index, [], rule_of("causal", Dims(70, 70))))
        changed = [index[0], index[1].clone(), index[2]]
        changed[1][:, 41:] = torch.randn(2, 29, 4, dtype=torch.float64)
        after = form.choose(Operands(*qkv, captured + changed, [], rule_of("causal", Dims(70, 70))))
        assert torch.equal(before[:, :, :41], after[:, :, :41]) and not torch.equal(before, after)


def region(rule: str = "causal", L: int = 512, S: int = 512, Hq: int = 4, H: int = 2, **facts) -> AttentionRegion:
    facts = {"written": "sdpa", "dtype": "float32", "device": "cpu", **facts}
    shape = AttentionShape(1, Hq, H, L, S, 64, 64)
    return AttentionRegion("layer", "sdpa", rule_of(rule, Dims(L, S)), shape, **facts)


@pytest.mark.parametrize(
    ("spelling", "where", "says"),
    [
        ("token_top_k{blocks=4}", region(), "use scorer=indexer"),
        ("token_top_k{scorer=indexer}", region(), "needs index_query"),
        ("cache_eviction", region(L=1), "serves prefill and training, found decode"),
        ("cache_eviction", region(L=64), "64 queries of 512 keys"),
        ("cache_eviction", region("plain"), "use it for causal attention"),
        ("key_importance", region(), "use token_top_k"),
    ],
)
def test_a_refusal_is_a_sentence(spelling: str, where: AttentionRegion, says: str) -> None:
    why = parse_form(spelling).refuse(where)
    assert why is not None and says in why and why.endswith(".")


INDEX = (("index_query", (1, 3, 512, 8)), ("index_key", (1, 512, 8)), ("index_weight", (1, 512, 3)))


@pytest.mark.parametrize(
    ("spelling", "where"),
    [
        ("token_top_k", region()),
        ("token_top_k{scorer=indexer}", region(weights=INDEX)),
        ("cache_eviction", region()),
        ("key_importance", region("alibi")),
    ],
)
def test_its_neighbour_applies(spelling: str, where: AttentionRegion) -> None:
    assert parse_form(spelling).refuse(where) is None


def test_on_a_cpu_it_pays_for_decoding_with_one_key_head_and_not_for_prompts() -> None:
    prompt = region("causal", 16384, 16384, 8, 8, written="sdpa_causal")
    form = parse_form("token_top_k{top_k=1024}")
    assert form.seconds(prompt, CPU) > 2 * Dense().seconds(prompt, CPU)
    index = (("index_query", (1, 4, 1, 32)), ("index_key", (1, 32768, 32)), ("index_weight", (1, 1, 4)))
    shape = AttentionShape(1, 16, 1, 1, 32768, 576, 512)
    step = replace(region("plain", 1, 32768, weights=index), shape=shape)
    form = parse_form("token_top_k{scorer=indexer,top_k=2048}")
    assert form.refuse(step) is None and form.seconds(step, CPU) < 0.5 * Dense().seconds(step, CPU)


def off(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()
