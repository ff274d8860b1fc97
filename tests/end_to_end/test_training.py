"""Training through attnc: checkpointing recomputes, wrapped and quantised linears, torch.func, double backward."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.tiny import Net, assert_same_step, compiled, rewritten, tokens, trained
from tests.tolerance import assert_close, error

ROOT = Path(__file__).resolve().parents[2]


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def saved_bytes(call) -> int:
    """Bytes kept for the backward of one call."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def test_checkpointed_layers_are_rewritten_and_still_recomputed():
    x = tokens(96)
    kept = {}
    for name, around in (("all", None), ("checkpointed", checkpointed)):
        model = Net(3, around)
        fast = compiled(model)
        assert_same_step(trained(model, x, fast), trained(model, x))
        assert rewritten(fast) == 3
        kept[name] = saved_bytes(lambda fast=fast: fast(x))
        torch._dynamo.reset()
        if around is not None:
            plain = torch.compile(model, backend="aot_eager")
            plain(x)
            kept["plain"] = saved_bytes(lambda plain=plain: plain(x))
    assert kept["checkpointed"] <= 0.5 * kept["all"], kept
    assert kept["checkpointed"] <= 1.1 * kept["plain"], kept


def test_checkpointed_dropout_recomputes_with_the_same_random_numbers():
    def dropped(layer, h):
        return checkpoint(lambda y: F.dropout(layer(y), 0.3), h, use_reentrant=False)

    model, x = Net(2, dropped), tokens()
    runs = []
    for call in (None, compiled(model)):
        torch.manual_seed(3)
        runs.append(trained(model, x, call))
    assert_same_step(runs[1], runs[0])


PEAK = """
import sys, torch
from pathlib import Path
from torch.utils.checkpoint import checkpoint
from tests.tiny import Net, compiled, tokens

def status(key):  # kB of this process
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(key + ":"))

def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)

torch.set_num_threads(1)
model, x = Net(8, checkpointed if sys.argv[1] == "checkpointed" else None), tokens(512, 4)
step = compiled(model, force=None, options={"forms": ()}) if sys.argv[2] == "left" else compiled(model)
step(x).sum().backward()
Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
before = status("VmRSS")
step(x).sum().backward()
print("PEAK", (status("VmHWM") - before) / 1024)
"""


def peak(layers: str, regions: str) -> float:
    """MiB that one training step in a process of its own adds to its memory; freed tensors go back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run([sys.executable, "-c", PEAK, layers, regions], cwd=ROOT, env=environment, capture_output=True,
                         text=True, check=True, timeout=300)
    return float(out.stdout.split("PEAK")[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize("regions", ["left", "rewritten"])
def test_peak_memory_of_a_checkpointed_step_is_lower(regions):
    assert peak("checkpointed", regions) < 0.7 * peak("all", regions)


class LowRank(nn.Module):
    """A frozen linear with a trained update of rank 4, as LoRA wraps it (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, linear.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(linear.out_features, 4) * 0.1)

    def forward(self, x):
        return self.linear(x) + 2.0 * F.linear(F.linear(x, self.down), self.up)


class Int8(nn.Module):
    """A linear whose weight is stored as int8 with one scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("wrap", [LowRank, Int8])
def test_wrapped_linears_around_the_regions(wrap):
    model, x = Net(), tokens()
    for layer in model.layers:
        layer.qkv, layer.out = wrap(layer.qkv), wrap(layer.out)
    fast = compiled(model)
    got, want = trained(model, x, fast), trained(model, x)
    assert_same_step(got, want)
    assert len(want[1]) < len(list(model.parameters())) or wrap is Int8
    assert rewritten(fast) == 2


# torch.func and gradients of gradients.


@pytest.mark.parametrize("call", ["vmap", "grad", "jvp", "jacrev", "hessian"])
def test_transforms_of_a_compiled_function(call):
    def loss(q):
        return ((q @ q.mT / 4).softmax(-1) @ q).square().sum()

    q = torch.randn(3, 2, 4, 4)
    fast = compiled(loss)
    if call == "vmap":
        got, want = (torch.func.vmap(f)(q) for f in (fast, loss))
    elif call == "jvp":
        got, want = (torch.func.jvp(f, (q,), (q,))[1] for f in (fast, loss))
    else:
        got, want = (getattr(torch.func, call)(f)(q[0]) for f in (fast, loss))
    assert_close(got, want)


def test_vmap_inside_the_compiled_function_is_rewritten():
    def mapped(q):
        return torch.func.vmap(lambda x: (x @ x.mT / 4).softmax(-1) @ x)(q)

    q = torch.randn(3, 2, 8, 4)
    fast = compiled(mapped)
    assert_close(fast(q), mapped(q))
    assert rewritten(fast) == 1


def test_a_gradient_transform_inside_the_compiled_function_is_left_with_a_warning():
    def sloped(q):
        return torch.func.grad(lambda x: ((x @ x.mT / 4).softmax(-1) @ x).sum())(q)

    q = torch.randn(2, 8, 4)
    fast = compiled(sloped, options={"strict": False})
    with pytest.warns(UserWarning, match=r"torch.func transform grad .*goes to the inner backend as written"):
        got = fast(q)
    assert_close(got, sloped(q))
    assert rewritten(fast) == 0


def test_functional_call_with_other_weights():
    model, x = Net().eval(), tokens()
    weights = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    fast = compiled(lambda w, x: torch.func.functional_call(model, w, (x,)))
    with torch.no_grad():
        assert_close(fast(weights, x), torch.func.functional_call(model, weights, (x,)))
    assert rewritten(fast) == 2


def test_gradient_taken_inside_the_compiled_function():
    model, x = Net(), tokens()

    def slope(x):
        return torch.autograd.grad(model(x).square().mean(), list(model.parameters())[:2])

    fast = compiled(slope)
    for got, want in zip(fast(x), slope(x), strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_marked_for_gradients_inside_does_not_stop_the_capture(kept, grad):
    model, x = Net(), tokens()

    def marked(x):
        start = torch.zeros_like(x).requires_grad_()
        out = model(x + start)
        return (out, start + 1) if kept else (out,)

    fast = compiled(marked)
    with torch.set_grad_enabled(grad):
        for got, want in zip(fast(x), marked(x), strict=True):
            assert_close(got, want)
    assert rewritten(fast) == 2


def test_double_backward_is_refused_with_a_sentence():
    model, x = Net(), tokens().requires_grad_()
    out = compiled(model)(x)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.square().sum().backward()


def test_double_backward_with_the_eager_inner_backend_is_refused_where_sdpa_has_none():
    model, x = Net(), tokens().requires_grad_()
    (first,) = torch.autograd.grad(compiled(model, inner="eager")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*scaled_dot_product.* is not implemented"):
        first.square().sum().backward()


@pytest.mark.slow
def test_transformers_gradient_checkpointing_recomputes():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, attn_implementation="eager", use_cache=False,
    )
    ids = torch.randint(0, 50, (2, 64))
    kept = {}
    for name in ("all", "checkpointed"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).train()
        if name == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fast = compiled(model)

        def logits(call, ids=ids):
            return call(ids).logits

        got = trained(model, ids, lambda ids, fast=fast: logits(fast))
        want = trained(model, ids, lambda ids, model=model: logits(model))
        assert_same_step(got, want)
        assert rewritten(fast) == 3
        kept[name] = saved_bytes(lambda fast=fast: fast(ids).logits)
        torch._dynamo.reset()
    assert kept["checkpointed"] <= 0.6 * kept["all"], kept


