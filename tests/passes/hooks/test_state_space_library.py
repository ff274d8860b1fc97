"""Functions of mamba_ssm and causal_conv1d, here stand-ins of the same names and signatures: one graph."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

import attnc
from attnc.passes.hooks import table as hooks

LIBRARY = '''
import torch
import torch.nn.functional as F

def _steps(dt, bias, softplus):
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt

def _done(y, x, D, z):
    y = y if D is None else y + x.float() * D
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)

@torch.compiler.disable
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    B, C = (t.float() if t.dim() < 4 else t.float().repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (B, C))
    B, C = (t if t.dim() == 4 else t[:, None] for t in (B, C))
    delta = _steps(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus)
    S, outs = u.new_zeros(u.shape[0], *A.shape).float(), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        S = torch.exp(step * A) * S + step * B[..., t] * u[:, :, t, None].float()
        outs.append((S * C[..., t]).sum(-1))
    out = _done(torch.stack(outs, 2), u, None if D is None else D[:, None], z)
    return (out, S) if return_last_state else out

@torch.compiler.disable
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
                              return_final_states=False, return_varlen_states=False):
    B, C = (t.float().repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    dt = _steps(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    S = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]).float() if initial_states is None else initial_states
    outs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        if seq_idx is not None and t > 0:
            S = S * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        S = torch.exp(step * A[:, None, None]) * S + step * x[:, t, :, :, None].float() * B[:, t, :, None]
        outs.append((S * C[:, t, :, None]).sum(-1))
    out = _done(torch.stack(outs, 1), x, D if D is None or D.dim() == 2 else D[:, None], z)
    return (out, S) if return_final_states else out

@torch.compiler.disable
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                           state_batch_indices=None):
    dt = _steps(dt, dt_bias, dt_softplus)
    B, C = (t.float() if t.dim() < 3 else t.float().repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    B, C = (t[:, None] if t.dim() == 2 else t[:, :, None] for t in (B, C))
    state.copy_(torch.exp(dt[..., None] * A) * state + dt[..., None] * B * x[..., None].float())
    return _done((state * C).sum(-1), x, D, z)

@torch.compiler.disable
def mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
                                     seq_idx=None, dt_limit=(0.0, float("inf")), return_final_states=False,
                                     activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None,
                                     outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True):
    (b, l, _), H, G = zxbcdt.shape, len(A), ngroups
    own = H * (headdim or D.shape[-1])
    more = zxbcdt.shape[-1] - own - len(conv1d_weight) - H
    a, c, z, u, dt = zxbcdt.split([more // 2, more // 2, own, len(conv1d_weight), H], -1)
    u = causal_conv1d_fn(u.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT
    B, C = u[..., own:].reshape(b, l, 2, G, -1).unbind(2)
    y, S = mamba_chunk_scan_combined(u[..., :own].reshape(b, l, H, -1), dt, A, B, C, chunk_size, D, None, dt_bias,
                                     initial_states, seq_idx, None, True, dt_limit, True)
    y = y.reshape(b, l, own)
    if rmsnorm_weight is None:
        y = y * F.silu(z)
    else:
        y = y if norm_before_gate else y * F.silu(z)
        size = y.view(b, l, G, own // G).square().mean(-1, keepdim=True) + rmsnorm_eps
        y = (y.view(b, l, G, own // G) * size ** -0.5).view(b, l, own) * rmsnorm_weight
        y = y * F.silu(z) if norm_before_gate else y
    y = torch.cat([F.silu(a) * c, y], -1)
    y = y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
    return (y, S) if return_final_states else y
'''  # fmt: skip
CONVOLUTIONS = '''
import torch
import torch.nn.functional as F

def _sum(taps, weight, bias, activation):
    y = sum(x.float() * w.float() for x, w in zip(taps, weight.unbind(1))) + (0 if bias is None else bias.float())
    return y if activation is None else F.silu(y)

@torch.compiler.disable
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):
    W = weight.shape[1]
    held = [*(x.new_zeros(*x.shape[:2], W - 1) if initial_states is None else initial_states).unbind(-1), *x.unbind(-1)]
    outs = []
    for t in range(x.shape[-1]):
        taps = held[t : t + W]
        if seq_idx is not None:
            same = [p >= 0 and (seq_idx[:, p] == seq_idx[:, t])[:, None] for p in range(t - W + 1, t + 1)]
            taps = [tap * s for tap, s in zip(taps, same)]
        outs.append(_sum(taps, weight, bias, activation).to(x.dtype))
    out = torch.stack(outs, -1)
    return (out, torch.stack(held[len(held) - W + 1:], -1)) if return_final_states else out

@torch.compiler.disable
def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None):
    outs = []
    for token in x.view(*x.shape[:2], -1).unbind(-1):
        conv_state.copy_(torch.cat([conv_state, token[..., None]], -1)[..., 1:])
        late = torch.cat([conv_state.new_zeros(*token.shape, weight.shape[1]), conv_state], -1).unbind(-1)
        outs.append(_sum(late[len(late) - weight.shape[1]:], weight, bias, activation).to(x.dtype))
    return torch.stack(outs, -1).view(x.shape)
'''  # fmt: skip
Bt, L, H, P, N, G, W = 2, 11, 4, 3, 5, 2, 4
INNER, CONVOLVED = H * P, H * P + 2 * G * N


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    convolutions = types.ModuleType("causal_conv1d.stand_in")
    exec(CONVOLUTIONS, convolutions.__dict__)
    module = types.ModuleType("mamba_ssm.ops.stand_in")
    exec(LIBRARY, module.__dict__)
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):  # as mamba_ssm imports them
        setattr(module, name, getattr(convolutions, name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, convolutions.__name__, convolutions)
    monkeypatch.setattr(hooks, "_VERDICTS", {})
    return module


def new(*shape: int) -> Tensor:
    return torch.randn(shape)


def scan(**more: object) -> dict[str, object]:
    least = {"u": new(Bt, H, L), "delta": new(Bt, H, L), "A": -new(H, N).abs(), "B": new(Bt, N, L), "C": new(Bt, N, L)}
    return {**least, "D": new(H), "z": new(Bt, H, L), "delta_bias": new(H), "delta_softplus": True, **more}


def chunks(**more: object) -> dict[str, object]:
    given = {"x": new(Bt, L, H, P), "dt": new(Bt, L, H), "A": -new(H).abs(), "B": new(Bt, L, G, N)}
    given |= {"C": new(Bt, L, G, N), "chunk_size": 4, "dt_bias": new(H), "dt_softplus": True}
    return {**given, **more}


def step(**more: object) -> dict[str, object]:
    given = {"state": new(Bt, H, P, N), "x": new(Bt, H, P), "dt": new(Bt, H, 1).expand(-1, -1, P)}
    given |= {"A": (-new(H, 1, 1).abs()).expand(-1, P, N), "B": new(Bt, G, N), "C": new(Bt, G, N)}
    return {**given, "D": new(H, P), "dt_bias": new(H, 1).expand(-1, P), "dt_softplus": True, **more}


def convolved(**more: object) -> dict[str, object]:
    return {"x": new(Bt, L, H).mT, "weight": new(H, W), "bias": new(H), "activation": "silu", **more}


def convolved_step(*tokens: int) -> dict[str, object]:
    return {"x": new(Bt, H, *tokens), "conv_state": new(Bt, H, W), "weight": new(H, W - 1), "activation": "swish"}


def block(beside: int = 0, **more: object) -> dict[str, object]:
    wide = beside + INNER
    given = {"zxbcdt": new(Bt, L, 2 * beside + INNER + CONVOLVED + H), "conv1d_weight": new(CONVOLVED, W)}
    given |= {"conv1d_bias": new(CONVOLVED), "dt_bias": new(H), "A": -new(H).abs(), "D": new(H, P), "chunk_size": 4}
    return {**given, "outproj_weight": new(7, wide), "outproj_bias": new(7), "ngroups": G, **more}


PACKED = torch.tensor([[0] * 3 + [1] * 8, [0] * 7 + [1] * 4], dtype=torch.int32)
CALLS = {
    "scan": ("selective_scan_fn", scan),
    "scan_of_groups_with_its_state": (
        "selective_scan_fn",
        lambda: scan(B=new(Bt, G, N, L), C=new(Bt, G, N, L), z=None, return_last_state=True),
    ),
    "chunks": ("mamba_chunk_scan_combined", lambda: chunks(D=new(H), z=new(Bt, L, H, P))),
    "chunks_from_a_state": (
        "mamba_chunk_scan_combined",
        lambda: chunks(D=new(H, P), initial_states=new(Bt, H, P, N), dt_limit=(0.1, 2.0), return_final_states=True),
    ),
    "chunks_of_packed_sequences": (
        "mamba_chunk_scan_combined",
        lambda: chunks(seq_idx=PACKED),
    ),
    "step": ("selective_state_update", step),
    "step_of_heads_of_one_channel": (
        "selective_state_update",
        lambda: step(
            state=new(Bt, H, 1, N), x=new(Bt, H, 1), dt=new(Bt, H, 1), A=(-new(H, 1, 1).abs()).expand(-1, 1, N),
            D=new(H, 1), dt_bias=new(H, 1),
        ),
    ),
    "block": ("mamba_split_conv1d_scan_combined", lambda: block(rmsnorm_weight=new(INNER), norm_before_gate=False)),
    "block_of_packed_sequences": (
        "mamba_split_conv1d_scan_combined",
        lambda: block(rmsnorm_weight=new(INNER), D=new(H), headdim=P, seq_idx=PACKED, activation=None),
    ),
    "block_beside_units_with_its_state": (
        "mamba_split_conv1d_scan_combined",
        lambda: block(8, dt_limit=(0.1, 2.0), initial_states=new(Bt, H, P, N), return_final_states=True),
    ),
    "convolution": ("causal_conv1d_fn", convolved),
    "convolution_from_a_state": (
        "causal_conv1d_fn",
        lambda: convolved(initial_states=new(Bt, H, W - 1), return_final_states=True, activation=None),
    ),
    "convolution_of_packed_sequences": ("causal_conv1d_fn", lambda: convolved(seq_idx=PACKED, bias=None)),
    "convolution_step": ("causal_conv1d_update", convolved_step),
    "convolution_step_of_three_tokens": ("causal_conv1d_update", lambda: convolved_step(3)),
}  # fmt: skip


def run(function, given: dict[str, object], compiler: str | None = None):
    torch._dynamo.reset()
    tensors = {name: x.clone() if name.endswith("state") else x for name, x in given.items() if isinstance(x, Tensor)}
    rest = {name: x for name, x in given.items() if not isinstance(x, Tensor)}

    def call(**tensors):
        out = function(**tensors, **rest)
        return [x * 2 for x in (out if isinstance(out, tuple) else (out,))]

    model = call if compiler is None else torch.compile(call, backend=compiler, options={"inner": "aot_eager"})
    return [*model(**tensors), *(x for name, x in tensors.items() if name.endswith("state"))], model


@pytest.mark.parametrize("name", CALLS)
def test_a_function_of_the_libraries_is_one_graph_and_a_scan_one_operator(library, name: str) -> None:
    function, given = getattr(library, CALLS[name][0]), CALLS[name][1]()
    want, _ = run(function, given)
    got, model = run(function, given, "attnc")
    report = attnc.last_report(model)
    regions = [r for r in report.regions if r.kind == "recurrence"]
    assert [r.written for r in regions] == ["operator"] * ("convolution" not in name)
    assert all(r.rule.packed == ("packed" in name) for r in regions)
    assert report.graphs == 1 and not report.problems and not report.unmatched
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize(
    "name",
    ["scan_of_groups_with_its_state", "chunks", "block_beside_units_with_its_state", "convolution_of_packed_sequences"],
)
def test_gradients_equal_those_of_the_library(library, name: str) -> None:
    function, given = getattr(library, CALLS[name][0]), CALLS[name][1]()
    leaves = [x.requires_grad_() for x in given.values() if isinstance(x, Tensor) and x.is_floating_point()]
    grads = []
    for compiler in ("attnc", None):
        out = run(function, given, compiler)[0]
        grads.append(torch.autograd.grad(sum(x.square().sum() for x in out), leaves))
    for a, b in zip(*grads, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@pytest.mark.parametrize(
    ("function", "given", "why"),
    [
        ("selective_scan_fn", lambda: scan(B=new(H, N)), "the same for all tokens"),
        ("selective_scan_fn", lambda: scan(A=torch.view_as_complex(new(H, N, 2))), "complex"),
        ("selective_state_update", lambda: step(A=-new(H, P, N).abs()), "may differ"),
        ("causal_conv1d_fn", lambda: convolved(activation="gelu"), "gelu"),
        ("causal_conv1d_update", lambda: convolved_step() | {"cache_seqlens": torch.zeros(Bt)}, "cache_seqlens"),
        ("mamba_chunk_scan_combined", lambda: chunks(cu_seqlens=torch.tensor([0, 4, L])), "cu_seqlens"),
    ],
)
def test_what_the_operator_has_no_setting_for_is_refused(library, function: str, given, why: str) -> None:
    assert why in str(hooks.hook_of(getattr(library, function)).refuse(given()))
