"""attnc::attention in eager and through AOTAutograd: same values, no extra work for an unused lse."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from attnc import ops
from attnc.errors import UsageError
from attnc.forms import parse_form
from attnc.forms.generated import kept_in, store_in
from attnc.rule_attention import AttentionRule
from tests.forms.rules import Dims, inputs, rule_of
from tests.tolerance import error

FLEX = "block_sparse{provider=flex,block_m=32,block_n=32}"
BLOCKED = "block_sparse{provider=blocked,block_m=16,block_n=16}"


def compiled(spelling: str, graphs: list, *, sizes: bool = False, **options):
    def record(graph: torch.fx.GraphModule, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def call(query, key, value, *captured):
        numbers = [key.shape[2] - query.shape[2]] if sizes else []
        return torch.ops.attnc.attention(query, key, value, list(captured), numbers, spelling)[0]

    return torch.compile(call, backend=aot_autograd(fw_compiler=record, bw_compiler=record), **options)


def targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("form", ["dense", BLOCKED])
@pytest.mark.parametrize("name", ["window", "softcap", "causal_padding_sink", "documents"])
def test_training_through_aot_is_eager(form: str, name: str) -> None:
    spelling = ops.spell_attention(form, rule_of(name, Dims(33, 33)))
    qkv, captured = inputs(Dims(33, 33, 4, 2))
    want = torch.ops.attnc.attention(*qkv, captured, [], spelling)[0]
    cotangent = torch.randn_like(want)
    leaves = [*qkv, captured[2]]
    want_grads = torch.autograd.grad(want, leaves, cotangent, allow_unused=True)
    graphs: list[torch.fx.GraphModule] = []
    got = compiled(spelling, graphs)(*qkv, *captured)
    grads = torch.autograd.grad(got, leaves, cotangent, allow_unused=True)
    assert error(got, want) < 1e-12 and len(graphs) == 2
    for one, two in zip(grads, want_grads, strict=True):
        assert (one is None and two is None) or error(one, two) < 1e-12


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["window", "causal_padding_sink", "documents", "softcap_sink"])
def test_flex_is_one_operator_in_the_graph(name: str, dynamic: bool) -> None:
    dims = Dims(70, 70, 4, 2)
    spelling = ops.spell_attention(FLEX, rule_of(name, dims))
    qkv, captured = inputs(dims, torch.float32, grad=False)
    want = torch.ops.attnc.attention(*qkv, captured, [], spelling)[0]
    graphs: list[torch.fx.GraphModule] = []
    with torch.inference_mode():
        got = compiled(spelling, graphs, dynamic=dynamic)(*qkv, *captured)
    assert error(got, want) < 1e-6
    assert targets(graphs[0]).count("flex_attention") == 1


def test_lengths_known_at_run_time_only_need_one_graph() -> None:
    rule = AttentionRule.parse("score=0.25 * s; keep=j - i - n0 <= 0 and i + n0 - j <= 15; empty=zero")
    for form in ("dense", FLEX):
        graphs: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        call = compiled(ops.spell_attention(form, rule), graphs, sizes=True, dynamic=True)
        with torch.no_grad():
            for dims in (Dims(33, 70, 4, 2), Dims(40, 90, 4, 2)):
                qkv, _ = inputs(dims, torch.float32, grad=False)
                want = torch.ops.attnc.attention(*qkv, [], [dims.S - dims.L], ops.spell_attention("dense", rule))[0]
                assert error(call(*qkv), want) < 1e-6
        assert len(graphs) == 1, form


@pytest.mark.parametrize("form", ["dense", BLOCKED])
def test_an_unused_lse_leaves_nothing_behind(form: str) -> None:
    spelling = ops.spell_attention(form, rule_of("causal" if form == "dense" else "window", Dims(32, 32), "never"))
    qkv, _ = inputs(Dims(32, 32, 4, 2), torch.float32, grad=False)
    graphs: list[torch.fx.GraphModule] = []
    with torch.no_grad():
        compiled(spelling, graphs)(*qkv)
    names = targets(graphs[0])
    assert not any(word in name for name in names for word in ("logsumexp", "matmul", "bmm", "aten.log"))


def test_dense_causal_is_one_kernel_and_builds_no_mask() -> None:
    qkv, _ = inputs(Dims(32, 32, 4, 2), torch.float32, grad=False)
    graphs: list[torch.fx.GraphModule] = []
    with torch.no_grad():
        compiled(ops.spell_attention("dense", rule_of("causal", Dims(32, 32))), graphs)(*qkv)
    names = [name for name in targets(graphs[0]) if "getitem" not in name]
    assert names == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]


def test_no_tensor_of_the_blocked_form_is_as_large_as_the_scores() -> None:
    dims = Dims(512, 512, 2, 1)
    spelling = ops.spell_attention("block_sparse{provider=blocked,block_m=32,block_n=32}", rule_of("window", dims))
    qkv, _ = inputs(dims, torch.float32)
    graphs: list[torch.fx.GraphModule] = []
    compiled(spelling, graphs)(*qkv).sum().backward()
    for graph in graphs:
        sizes = [n.meta["val"].numel() for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        assert max(sizes) < dims.L * dims.S / 2


def test_a_spelling_may_name_a_store_that_is_no_part_of_form_or_rule() -> None:
    rule, form = rule_of("causal", Dims(32, 32)), parse_form("flash{block_m=32}")
    for store in ("/a/store", "/odd | name @ place; empty=nan"):
        text = ops.spell_attention(kept_in(form.spell(), store), rule)
        assert ops.parse_attention(text) == (form, rule) and store_in(text) == store
    assert store_in(ops.spell_attention(form, rule)) is None


@pytest.mark.parametrize("text", ["dense", "dense | score=", "dense | scores=s", "dence | score=s"])
def test_a_wrong_spelling_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        ops.parse_attention(text)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", BLOCKED, FLEX])
@pytest.mark.parametrize("name", ["window", "softcap_sink", "causal_padding"])
def test_inductor_computes_the_same(name: str, form: str) -> None:
    dims = Dims(70, 70, 4, 2)
    spelling = ops.spell_attention(form, rule_of(name, dims))
    qkv, captured = inputs(dims, torch.float32, grad=False)
    want = torch.ops.attnc.attention(*qkv, captured, [], spelling)[0]
    with torch.no_grad():
        call = torch.compile(lambda q, k, v, *c: torch.ops.attnc.attention(q, k, v, list(c), [], spelling)[0])
        assert error(call(*qkv, *captured), want) < 2e-6
