"""Functions of mamba_ssm, here a stand-in of the same names and signatures: one operator, one graph."""

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
'''  # fmt: skip
Bt, L, H, P, N, G = 2, 11, 4, 3, 5, 2


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("mamba_ssm.ops.stand_in")
    exec(LIBRARY, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
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
        lambda: chunks(seq_idx=torch.tensor([[0] * 3 + [1] * 8, [0] * 7 + [1] * 4], dtype=torch.int32)),
    ),
    "step": ("selective_state_update", step),
}


def run(function, given: dict[str, object], compiler: str | None = None):
    torch._dynamo.reset()
    tensors = {name: x.clone() if name == "state" else x for name, x in given.items() if isinstance(x, Tensor)}
    rest = {name: x for name, x in given.items() if not isinstance(x, Tensor)}

    def call(**tensors):
        out = function(**tensors, **rest)
        return [x * 2 for x in (out if isinstance(out, tuple) else (out,))]

    model = call if compiler is None else torch.compile(call, backend=compiler, options={"inner": "aot_eager"})
    return [*model(**tensors), *(x for name, x in tensors.items() if name == "state")], model


@pytest.mark.parametrize("name", CALLS)
def test_a_function_of_the_library_is_one_operator_in_one_graph(library, name: str) -> None:
    function, given = getattr(library, CALLS[name][0]), CALLS[name][1]()
    want, _ = run(function, given)
    got, model = run(function, given, "attnc")
    report = attnc.last_report(model)
    (region,) = [r for r in report.regions if r.kind == "recurrence"]
    assert region.written == "operator" and region.rule.packed == ("packed" in name)
    assert report.graphs == 1 and not report.problems
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("name", ["scan_of_groups_with_its_state", "chunks"])
def test_gradients_equal_those_of_the_library(library, name: str) -> None:
    function, given = getattr(library, CALLS[name][0]), CALLS[name][1]()
    leaves = [x.requires_grad_() for x in given.values() if isinstance(x, Tensor)]
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
        ("mamba_chunk_scan_combined", lambda: chunks(cu_seqlens=torch.tensor([0, 4, L])), "cu_seqlens"),
    ],
)
def test_what_the_operator_has_no_setting_for_is_refused(library, function: str, given, why: str) -> None:
    assert why in str(hooks.hook_of(getattr(library, function)).refuse(given()))
