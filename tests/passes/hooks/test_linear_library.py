"""Functions of flash-linear-attention, here a stand-in of the same names and signatures: one operator, one graph."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

import attnc
from attnc.passes.hooks import table as hooks

STEPS = '''
import torch

def _steps(q, k, v, scale, state, update, cu_seqlens=None):
    B, T, H, K = k.shape
    starts = () if cu_seqlens is None else tuple(cu_seqlens)
    scale = K**-0.5 if scale is None else scale
    S = torch.zeros(B, H, K, v.shape[-1], dtype=torch.float32) if state is None else state.float()
    outs = []
    for t in range(T):
        S, seen = update(S * (t not in starts), t)
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t].float() * scale, seen))
    return torch.stack(outs, 1).to(v.dtype), S

def _add(k, v, t):
    return k[:, t, :, :, None].float() * v[:, t, :, None].float()
'''
FUNCTIONS = {
    "linear_attn": '''
@torch.compiler.disable
def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True,
                      head_first=False, cu_seqlens=None):
    def update(S, t):
        S = S + _add(k, v, t)
        return S, S
    out, S = _steps(q, k, v, scale, initial_state, update)
    if normalize:
        out = out / ((q * (k.shape[-1]**-0.5 if scale is None else scale) * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10)
    return out, S if output_final_state else None
''',
    "simple_gla": '''
def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
                     cu_seqlens=None):
    def update(S, t):
        decay = g[:, t, :, None, None] if g is not None else g_gamma[:, None, None]
        S = decay.exp() * S + _add(k, v, t)
        return S, S
    out, S = _steps(q, k, v, scale, initial_state, update, cu_seqlens)
    return out, S if output_final_state else None
''',
    "gla": '''
@torch.compiler.disable
def fused_recurrent_gla(q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False,
                        reverse=False, cu_seqlens=None):
    def update(S, t):
        S = gk[:, t, ..., None].exp() * S + _add(k, v, t)
        return S, S
    out, S = _steps(q, k, v, scale, initial_state, update, cu_seqlens)
    return out, S if output_final_state else None
''',
    "gated_delta_rule": '''
@torch.compiler.disable
def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, head_first=False):
    def update(S, t):
        S = g[:, t, :, None, None].exp() * S
        seen = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + k[:, t, ..., None] * (beta[:, t, :, None] * (v[:, t] - seen))[:, :, None]
        return S, S
    out, S = _steps(q, k, v, scale, initial_state, update, cu_seqlens)
    return out, S if output_final_state else None
''',
    "rwkv6": '''
@torch.compiler.disable
def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    def update(S, t):
        kv = _add(k, v, t)
        return w[:, t, ..., None].exp() * S + kv, S + u[:, :, None] * kv
    out, S = _steps(r, k, v, scale, initial_state, update, cu_seqlens)
    return out, S if output_final_state else None
''',
    "rwkv7": '''
@torch.compiler.disable
def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=True, cu_seqlens=None):
    def update(S, t):
        moved = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = w[:, t, ..., None].exp() * S + b[:, t, ..., None] * moved[:, :, None] + _add(k, v, t)
        return S, S
    out, S = _steps(r, k, v, scale, initial_state, update, cu_seqlens)
    return out, S if output_final_state else None
''',
    "hgrn": '''
@torch.compiler.disable
def fused_recurrent_hgrn(x, g, initial_state=None, output_final_state=False, cu_seqlens=None):
    h = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    outs = []
    for t in range(x.shape[1]):
        h = h * (cu_seqlens is None or t not in cu_seqlens.tolist())
        h = g[:, t].exp() * h + x[:, t]
        outs.append(h)
    return torch.stack(outs, 1), h if output_final_state else None
''',
    "gsa": '''
@torch.compiler.disable
def chunk_gsa(q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    def slots(S, t):
        S = g[:, t, :, None].exp() * S + _add(k, s, t)
        return S, S
    def values(S, t):
        S = g[:, t, ..., None].exp() * S + _add(s, v, t)
        return S, S
    seen, first = _steps(q, k, s, scale, None, slots, cu_seqlens)
    out, last = _steps(seen.softmax(-1), s, v, 1.0, None, values, cu_seqlens)
    return out, (first, last) if output_final_state else None
''',
}  # fmt: skip
NAMES = {
    "linear_attn": "chunk_linear_attn", "simple_gla": "chunk_simple_gla", "gla": "fused_recurrent_gla",
    "gated_delta_rule": "chunk_gated_delta_rule", "rwkv6": "chunk_rwkv6", "rwkv7": "chunk_rwkv7",
    "hgrn": "fused_recurrent_hgrn", "gsa": "chunk_gsa",
}  # fmt: skip
B, T, H, D = 2, 9, 2, 4


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.FunctionType]:
    """The stand-in's functions by the names of their folders."""
    found = {}
    for name, text in FUNCTIONS.items():
        module = types.ModuleType(f"fla.ops.{name}.chunk")
        exec(STEPS + text, module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found[name] = getattr(module, NAMES[name])
    monkeypatch.setattr(hooks, "_VERDICTS", {})
    return found


def drawn(name: str, B: int = B) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    pairs = {x: new(B, T, H, D) / 2 for x in "qkv"}
    if name == "hgrn":
        return {"x": new(B, T, D), "g": -new(B, T, D).abs()}
    if name in ("rwkv6", "rwkv7"):
        more = {"u": new(H, D)} if name == "rwkv6" else {"a": new(B, T, H, D) / 2, "b": new(B, T, H, D) / 2}
        return {"r": pairs["q"], "k": pairs["k"], "v": pairs["v"], "w": -new(B, T, H, D).abs(), **more}
    gates = {"simple_gla": {"g": -new(B, T, H).abs()}, "gla": {"gk": -new(B, T, H, D).abs()}}
    gates["gsa"] = {"s": new(B, T, H, 3).exp(), "g": -new(B, T, H, 3).abs()}
    gates["gated_delta_rule"] = {"g": -new(B, T, H).abs(), "beta": new(B, T, H).sigmoid()}
    if name == "linear_attn":
        pairs["q"], pairs["k"] = pairs["q"].abs(), pairs["k"].abs()
    return {**pairs, **gates.get(name, {})}


def compiled(fn, given: dict[str, Tensor], **options):
    torch._dynamo.reset()

    def call(*tensors):
        return fn(**dict(zip(given, tensors, strict=True)), **options)[0] * 2

    model = torch.compile(call, backend="attnc", options={"inner": "aot_eager"})
    return model, call


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_a_function_of_the_library_is_one_operator_in_one_graph(fla, name: str) -> None:
    given = drawn(name)
    model, plain = compiled(fla[name], given)
    out = model(*given.values())
    report = attnc.last_report(model)
    regions = [r for r in report.regions if r.kind == "recurrence"]
    assert len(regions) == 1 + (name == "gsa") and all(r.written == "operator" for r in regions)
    assert report.graphs == 1 and not report.problems
    want = plain(*given.values())
    assert float((out - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_gradients_equal_those_of_the_library(fla) -> None:
    given = {name: x.requires_grad_() for name, x in drawn("gated_delta_rule").items()}
    model, plain = compiled(fla["gated_delta_rule"], given)
    grads = torch.autograd.grad(model(*given.values()).square().sum(), list(given.values()))
    want = torch.autograd.grad(plain(*given.values()).square().sum(), list(given.values()))
    for a, b in zip(grads, want, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


PACKED = [name for name in FUNCTIONS if name != "linear_attn"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_start_anew(fla, name: str) -> None:
    given = {**drawn(name, B=1), "cu_seqlens": torch.tensor([0, 4, 5, T])}
    model, plain = compiled(fla[name], given, output_final_state=False)
    out, want = model(*given.values()), plain(*given.values())
    report = attnc.last_report(model)
    regions = [r for r in report.regions if r.kind == "recurrence"]
    assert len(regions) == 1 + (name == "gsa") and all(r.rule.packed for r in regions) and not report.problems
    assert float((out - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_packed_sequences_with_states_are_left_to_the_library(fla) -> None:
    given = drawn("simple_gla", B=1)
    model, plain = compiled(fla["simple_gla"], given, output_final_state=True, cu_seqlens=(0, 4, T))
    assert torch.allclose(model(*given.values()), plain(*given.values()), atol=1e-6)
    (entry,) = [u for u in attnc.last_report(model).unmatched if u.anchor == "chunk_simple_gla"]
    assert "a state for each packed sequence" in entry.reason


def test_other_compilers_still_break_at_the_library(fla) -> None:
    given = drawn("gla")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda *x: fla["gla"](*x)[0], backend="aot_eager", fullgraph=True)(*given.values())
