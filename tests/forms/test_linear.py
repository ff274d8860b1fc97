"""Linear attention by name: its maps against the quadratic formula, supplied weights, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.cost_models.device import device_named
from attnc.errors import UsageError
from attnc.forms import FORMS, parse_form
from attnc.forms.linear import LinearAttention, directions
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.ops import attention, spell_attention
from attnc.options import Options
from attnc.passes.choose import approximations, choose
from attnc.plan import Plan
from attnc.region import AS_WRITTEN, AttentionRegion, Choice
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.forms.rules import Dims, inputs, rule_of

LENGTHS = (1, 33, 70)
LEARNED = LinearAttention("hedgehog")
WINDOWED = LinearAttention("hedgehog", window=32)
SETTINGS = (*map(LinearAttention, ("elu1", "relu", "squares", "taylor")), LinearAttention("favor", 64), LEARNED)
CAUSAL, PLAIN = AttentionRule.parse("score=0.25 * s; keep=j <= i"), AttentionRule.parse("score=0.25 * s")
WEIGHTS = ("query_map", "key_map", "window_factor", "linear_factor")


def weights(form: LinearAttention, Hq: int, H: int, E: int, *, grad: bool = False, dtype=torch.float64) -> dict:
    torch.manual_seed(1)
    sizes = {"query_map": (Hq, E, 4), "key_map": (H, E, 4), "window_factor": (1, Hq, 1, 1), "linear_factor": (Hq,)}
    return {n: torch.rand(*sizes[n], dtype=dtype).requires_grad_(grad) for n in form.weights}


def run(form: LinearAttention, qkv: list, held: list, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    return attention(*qkv, held, [], spell_attention(form, rule))


def written(form: LinearAttention, q: Tensor, k: Tensor, v: Tensor, held: dict, causal: bool, scale: float) -> Tensor:
    """The quadratic formula, map by map, written out apart from the form."""
    group = q.shape[1] // k.shape[1]
    u = held.get("key_map")
    u = u.repeat_interleave(q.shape[1] // u.shape[0], 0) if u is not None else None
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = scale * q @ k.mT
    if form.map in ("elu1", "relu"):
        phi = {"elu1": lambda x: torch.where(x > 0, x + 1, x.exp()), "relu": lambda x: x.clamp(min=0)}[form.map]
        w = phi(q) @ phi(k).mT
    elif form.map == "favor":
        omega, half = directions(form.features, q.shape[-1]), math.sqrt(scale)
        phi = [(x * half @ omega.mT - (x * half).square().sum(-1, keepdim=True) / 2).exp() for x in (q, k)]
        w = phi[0] @ phi[1].mT / form.features
    elif form.map == "hedgehog":
        z = [torch.einsum("bhld,hdf->bhlf", x, m) for x, m in ((q, held["query_map"]), (k, u))]
        w = sum(F.softmax(sign * z[0], -1) @ F.softmax(sign * z[1], -1).mT for sign in (1, -1))
    else:
        w = s * s if form.map == "squares" else 1 + s + s * s / 2
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    if form.window:
        near = (j <= i) & (j > i - form.window)
        top = s.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
        factors = [held[n].view(1, -1, 1, 1) for n in ("window_factor", "linear_factor")]
        w = torch.where(near, factors[0] * (s - top).exp(), factors[1] * w)
    w = w.masked_fill(j > i, 0.0) if causal else w
    return w @ v / w.sum(-1, keepdim=True)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_each_map_equals_its_quadratic_formula(length: int, heads: tuple[int, int]) -> None:
    dims = Dims(length, length, *heads, 8, 6)
    torch.manual_seed(length)
    qkv, _ = inputs(dims, grad=False)
    for form, rule in [(f, r) for f in SETTINGS for r in (CAUSAL, PLAIN)] + [(WINDOWED, CAUSAL)]:
        held = weights(form, *heads, 8)
        found, lse = run(form, qkv, form.tensors(8, held), rule)
        # rows of relu that have no weight at all are 0 / 0 in the formula, and 0 here
        expected = written(form, *qkv, held, rule is CAUSAL, 0.25).nan_to_num(0.0)
        torch.testing.assert_close(found, expected, msg=lambda m, f=form: f"{f}: {m}")
        oracle = form.reference(Operands(*qkv, form.tensors(8, held), [], rule))
        torch.testing.assert_close((found, lse), oracle, msg=lambda m, f=form: f"{f}: {m}")


def test_a_query_reads_a_cache_of_keys_as_the_last_row_of_the_causal_sum() -> None:
    qkv, _ = inputs(Dims(70, 70, 4, 2, 8, 6), grad=False)
    for form in SETTINGS:
        held = form.tensors(8, weights(form, 4, 2, 8))
        whole = run(form, qkv, held, CAUSAL)[0][:, :, -1:]
        torch.testing.assert_close(run(form, [qkv[0][:, :, -1:], *qkv[1:]], held, PLAIN)[0], whole)


def test_a_key_map_may_be_by_query_head() -> None:
    qkv, _ = inputs(Dims(33, 33, 4, 2, 8, 6), grad=False)
    for form, rule in ((LEARNED, CAUSAL), (LEARNED, PLAIN), (WINDOWED, CAUSAL)):
        held = weights(form, 4, 4, 8)
        found = run(form, qkv, form.tensors(8, held), rule)[0]
        torch.testing.assert_close(found, written(form, *qkv, held, rule is CAUSAL, 0.25))


def test_more_random_features_come_closer_to_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 33, 8, dtype=torch.float64) for _ in range(3))
    exact = reference(Operands(q, k, v, [], [], CAUSAL))[0]
    forms = [LinearAttention("favor", m) for m in (16, 256, 4096)]
    gaps = [float((run(form, [q, k, v], [], CAUSAL)[0] - exact).norm()) for form in forms]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.2 * float(exact.norm())


def test_random_directions_are_orthogonal_and_always_the_same() -> None:
    omega = directions(16, 8)
    for block in omega.split(8):
        gram = block @ block.mT
        torch.testing.assert_close(gram, gram.diagonal().diag())
    directions.cache_clear()
    torch.manual_seed(7)
    assert torch.equal(omega, directions(16, 8))


@pytest.mark.parametrize("form", [LinearAttention(), LinearAttention("taylor"), LEARNED, WINDOWED], ids=lambda f: f.map)
def test_gradients_are_those_of_the_formula(form: LinearAttention) -> None:
    qkv, _ = inputs(Dims(33, 33, 2, 1, 8, 6))
    held = weights(form, 2, 1, 8, grad=True)
    wanted = [*qkv, *held.values()]
    out = run(form, qkv, form.tensors(8, held), CAUSAL)[0]
    found = torch.autograd.grad(out.square().sum(), wanted)
    expected = torch.autograd.grad(written(form, *qkv, held, True, 0.25).square().sum(), wanted)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_narrow_types_are_kept_in_float32(dtype: torch.dtype) -> None:
    qkv, _ = inputs(Dims(70, 70, 2, 1, 8, 6), dtype, grad=False)
    for form in SETTINGS:
        held = form.tensors(8, weights(form, 2, 1, 8))
        found = run(form, qkv, held, CAUSAL)[0]
        expected = form.reference(Operands(*qkv, held, [], CAUSAL))[0]
        assert found.dtype == dtype and float((found - expected).abs().max()) < 1e-2 * float(expected.abs().max())


# What is asked of the region and of the user.


def region(length: int = 512, rule: AttentionRule = CAUSAL, **facts) -> AttentionRegion:
    shape = AttentionShape(1, 8, 2, length, length, 64, 64)
    facts = {"written": "sdpa", "dtype": "float32", "device": "cpu", "shape": shape, **facts}
    return AttentionRegion("layer", "sdpa", rule, **facts)


SUPPLIED = (
    ("query_map", (8, 64, 32)),
    ("key_map", (2, 64, 32)),
    ("window_factor", (8,)),
    ("linear_factor", (1, 8, 1, 1)),
)


def test_it_applies_to_causal_and_unmasked_attention_in_training_too() -> None:
    for where in (region(), region(rule=PLAIN), region(training=True), region(weights=SUPPLIED)):
        assert LinearAttention().refuse(where) is None and not LinearAttention().is_exact(where)
    assert LEARNED.refuse(region(weights=SUPPLIED)) is None and WINDOWED.refuse(region(weights=SUPPLIED)) is None
    cached = replace(region().shape, L=1)
    assert LinearAttention().refuse(region(rule=PLAIN, shape=cached)) is None


@pytest.mark.parametrize(
    ("form", "facts", "says"),
    [
        (LinearAttention(), {"device": "cuda"}, "lowered for the CPU only"),
        (LinearAttention(), {"rule": rule_of("window", Dims(512, 512))}, "found the mask"),
        (LinearAttention(), {"rule": rule_of("padding", Dims(512, 512))}, "found the mask"),
        (LinearAttention(), {"rule": rule_of("alibi", Dims(512, 512))}, "factor above 0"),
        (LinearAttention(), {"rule": AttentionRule.parse("score=2.0 * tanh(0.5 * s); keep=j <= i")}, "factor above 0"),
        (LinearAttention(), {"rule": AttentionRule.parse("score=-0.5 * s")}, "factor above 0"),
        (LinearAttention(), {"rule": AttentionRule.parse("score=0.5 * s; sink=f2[h]")}, "and a sink"),
        (LinearAttention(), {"rule": AttentionRule.parse("score=0.5 * s; dropout=0.1")}, "no random stream"),
        (LinearAttention(), {"shape": AttentionShape(1, 8, 2, 1, 512, 64, 64)}, "as many queries as keys"),
        (LinearAttention("taylor", window=64), {}, "needs the map hedgehog"),
        (WINDOWED, {"rule": PLAIN, "weights": SUPPLIED}, "needs a causal mask"),
        (LEARNED, {}, "needs weights query_map, key_map, found none for 'layer'; pass options={'weights': {'layer'"),
        (WINDOWED, {"weights": SUPPLIED[:2]}, "found query_map, key_map for 'layer'"),
        (LEARNED, {"weights": (SUPPLIED[0], ("key_map", (2, 64, 16)))}, "key_map of shape (2, 64, 32) or (8, 64, 32)"),
        (LEARNED, {"weights": (("query_map", (2, 64, 32)), SUPPLIED[1])}, "query_map of shape (8, 64, 32), found"),
    ],
)  # fmt: skip
def test_a_refusal_is_a_sentence(form: LinearAttention, facts: dict, says: str) -> None:
    why = form.refuse(region(**facts))
    assert why is not None and says in why and why.endswith(".")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([1], "found list, allowed is a dict"),
        ({"layer": torch.ones(2)}, "allowed is a dict of regions"),
        ({"layer": {"query_mop": torch.ones(2)}}, "Did you mean 'query_map'"),
        ({"layer": {"query_map": [1.0]}}, "found list, allowed is a tensor"),
        ({"layer": {"query_map": torch.ones(2, dtype=torch.int64)}}, "found torch.int64"),
        ({"layer": {"query_map": torch.ones(2, requires_grad=True) * 2}}, "allowed are leaves"),
    ],
)
def test_weights_that_cannot_be_are_refused_at_once(given: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Options(weights=given)  # type: ignore[arg-type]


def test_settings_that_differ_in_an_unused_knob_are_tried_once() -> None:
    offers, refused = approximations(region(weights=SUPPLIED), Options(allow=("linear",)))
    forms = [form for _, form in offers]
    assert len(forms) == len(set(forms)) == 12 and not refused
    offers, refused = approximations(region(), Options(allow=("linear",)))
    assert len(offers) == 8 and all("hedgehog" in name for name in refused)


def test_a_window_of_zero_is_a_knob() -> None:
    for form in (*SETTINGS, WINDOWED):
        assert parse_form(form.spell()) == form
    assert parse_form("linear") == LinearAttention() and LinearAttention in FORMS
    with pytest.raises(UsageError, match="a positive integer in random features"):
        parse_form("linear{features=0}")


def test_a_plan_takes_it_where_allow_and_the_weights_are() -> None:
    plan = Plan({"layer": Choice(LEARNED.spell(), "found", error=0.01)}, device=device_named("cpu").name)
    plan = Plan.from_json(plan.to_json())
    supplied = region(weights=SUPPLIED)
    assert choose(supplied, Options(plan=plan, allow=("linear",))).choice.form == LEARNED.spell()
    assert "approximation by name" in choose(supplied, Options(plan=plan)).choice.reason
    bare = choose(region(), Options(plan=plan, allow=("linear",))).choice
    assert bare.form == AS_WRITTEN and "needs weights" in bare.reason


def test_time_grows_with_the_length_and_not_its_square() -> None:
    cpu = device_named("cpu")
    for form in (*SETTINGS, WINDOWED):
        times = [form.seconds(region(n, weights=SUPPLIED), cpu) for n in (8192, 16384)]
        assert 1.5 < times[1] / times[0] < 2.5, form


# Through torch.compile.


class Attention(nn.Module):
    """Causal attention, 2 heads of 8 on one head of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def made(form: LinearAttention, held: dict | None = None, **options) -> tuple[Model, object, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(3)
    model, x = Model().requires_grad_(False), torch.randn(2, 33, 16)
    options = {"inner": "aot_eager", "strict": True, "allow": ["linear"], "force": form.spell(), **options}
    fast = torch.compile(model, backend="attnc", options={**options, "weights": {"attention": held} if held else {}})
    return model, fast, x


@pytest.mark.parametrize("form", SETTINGS[3:5], ids=lambda f: f.map)
def test_maps_without_weights_need_none(form: LinearAttention) -> None:
    model, fast, x = made(form)
    with torch.no_grad():
        found = fast(x)
    choice = attnc.last_report(fast).regions[0].choice
    assert choice.form == form.spell() and "approximate: error" in choice.reason
    a = model.attention
    q, k, v = (f(x).view(2, 33, -1, 8).transpose(1, 2).double() for f in (a.q, a.k, a.v))
    expected = written(form, q, k, v, {}, True, 8**-0.5).nan_to_num(0.0).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("form", "inner"),
    [(LEARNED, "eager"), (LinearAttention("hedgehog", window=8), "aot_eager")],
    ids=["maps", "window"],
)
def test_steps_on_supplied_weights_reduce_the_error(form: LinearAttention, inner: str) -> None:
    """The first in a frozen model, the second in one that trains."""
    held = weights(form, 2, 1, 8, grad=True, dtype=torch.float32)
    model, fast, x = made(form, held, inner=inner)
    model.requires_grad_(form.window > 0)
    target, steps = model(x).detach(), torch.optim.SGD(held.values(), lr=0.05)
    errors = []
    for _ in range(20):
        steps.zero_grad()
        loss = (fast(x) - target).square().sum()
        loss.backward()
        errors.append(loss.item())
        steps.step()
    assert attnc.last_report(fast).regions[0].choice.form == form.spell()
    assert all(w.grad is not None and bool(w.grad.abs().sum() > 0) for w in held.values())
    assert errors[-1] < 0.9 * errors[0]


def test_weights_that_are_parameters_of_the_model_are_read_anew() -> None:
    held = {name: nn.Parameter(w) for name, w in weights(LEARNED, 2, 1, 8, dtype=torch.float32).items()}
    model, fast, x = made(LEARNED, held)
    model.maps = nn.ParameterDict(held)
    before = fast(x).detach()
    with torch.no_grad():
        model.maps["key_map"].mul_(-3)
    assert float((fast(x) - before).detach().abs().max()) > 1e-3
    with torch.no_grad():
        model.maps["key_map"].div_(-3)
    torch.testing.assert_close(fast(x).detach(), before)


def test_without_weights_the_region_stays_as_written() -> None:
    model, fast, x = made(LEARNED)
    torch.testing.assert_close(fast(x), model(x))
    assert "needs weights" in attnc.last_report(fast).regions[0].choice.reason


def test_weights_of_another_place_are_noted() -> None:
    options = {"weights": {"attentoin": weights(LEARNED, 2, 1, 8)}}
    report = attnc.explain(Model(), torch.randn(1, 33, 16), options=options)
    assert any("'attentoin'" in note and "which has attention" in note for note in report.notes)


def test_a_budget_measures_settings_with_and_without_weights_and_its_plan_runs() -> None:
    torch._dynamo.reset()
    model, x = Model().requires_grad_(False), torch.randn(1, 4096, 16)
    held = {"attention": weights(LEARNED, 2, 1, 8, dtype=torch.float32)}
    given = {"device": "cpu", "allow": ["linear"], "max_error": 1.0}
    with torch.no_grad():
        plan = attnc.autotune(model, x, **given, options={"weights": held})
        (choice,) = plan.choices.values()
        assert choice.name == "linear" and choice.error is not None
        assert LEARNED.spell() in choice.offers
        assert "needs weights" in choice.refused[LinearAttention("hedgehog", window=64).spell()]
        plan = Plan({"attention": Choice(LEARNED.spell(), "found")}, plan.device)
        options = {"plan": plan, "allow": ["linear"], "weights": held, "inner": "eager", "strict": True}
        fast = torch.compile(model, backend="attnc", options=options)
        fast(x)
    assert attnc.last_report(fast).regions[0].choice.form == LEARNED.spell()


def test_a_budget_knows_the_regions_that_weights_may_name() -> None:
    torch._dynamo.reset()
    options = {"weights": {"attentoin": weights(LEARNED, 2, 1, 8)}}
    with torch.no_grad(), pytest.raises(UsageError, match="Did you mean 'attention'"):
        attnc.autotune(Model(), torch.randn(1, 33, 16), device="cpu", allow=["linear"], options=options)
