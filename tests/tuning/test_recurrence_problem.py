"""Recurrences as problems: searched, compiled for a GPU that is not here, measured on this CPU, kept, and picked up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnc
from attnc import backend
from attnc.codegen.compile_stats import Compiled, Failure
from attnc.cost_models.device import device_named
from attnc.forms.chunked import Chunked
from attnc.offline import explain
from attnc.options import Options
from attnc.passes.choose_recurrence import choose_recurrence
from attnc.plan import Plan
from attnc.region import AS_WRITTEN, Choice, Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape
from attnc.tuned import record_key, records_in, tuned
from attnc.tuning import recurrence
from attnc.tuning.measure_recurrence import RecurrenceBench
from attnc.tuning.problem import Outcome
from attnc.tuning.problems import dearest, problems_in
from attnc.tuning.recurrence import RecurrenceProblem
from attnc.tuning.search import Search, Settings
from attnc.tuning.tune import tune
from tests.tuning.test_flash_problem import region as attention

DELTA = RecurrenceRule(decay="token", delta=True, gate="write", qk_norm=1e-6, scale=0.1, chunk=64)
SMALL = {"shape": RecurrenceShape(1, 2, 70, 8, 6, 1), "dtype": "float32"}
FAST = Settings(fidelity="predict", storage="memory")


def region(rule: RecurrenceRule = DELTA, **facts) -> Region:
    given = {"shape": RecurrenceShape(1, 16, 4096, 128, 128, 8), "dtype": "bfloat16", "device": "cpu", **facts}
    return Region(path="layers.0", node="recurrence", rule=rule, **given)


def problem(where: Region, device: str, store: str | None = None) -> RecurrenceProblem:
    (found,) = problems_in([where], [device], store)
    assert isinstance(found, RecurrenceProblem)
    return found


@pytest.fixture
def options(tmp_path) -> Options:
    return Options(device="h100", store=str(tmp_path))


@pytest.mark.parametrize("device", ["h100", "a100", "mi300x", "cpu"])
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_every_setting_of_the_space_is_valid_and_the_default_comes_first(device: str, decay: str) -> None:
    where, on = region(replace(DELTA, decay=decay)), device_named(device)
    space = problem(where, device).space()
    there = replace(where, device="cpu" if device == "cpu" else "cuda")
    assert space[0] == Chunked().space(there, on)[0] and len(set(space)) == len(space)
    assert all(form.refuse(there) is None and form.misfit(there, on) is None for form in space)
    assert device == "cpu" or all(form.chunk_size <= 128 for form in space)


def test_what_is_not_computed_in_chunks_is_no_problem() -> None:
    by_state = RecurrenceRule(decay="state", gate="write")
    one_token = RecurrenceShape(1, 16, 1, 128, 128, 8)
    kept = Choice(AS_WRITTEN, "left as written")
    assert problems_in([region(by_state), region(shape=one_token), region(choice=kept)], ["h100", "cpu"]) == []


def test_attentions_and_recurrences_are_problems_of_one_run() -> None:
    found = problems_in([attention(), region(), region(training=True)], ["h100", "cpu"])
    assert [p.device for p in found] == ["h100", "h100", "h100", "cpu", "cpu"] and len({p.key for p in found}) == 5


@pytest.mark.parametrize("device", ["h100", "mi300x"])
@pytest.mark.parametrize("training", [False, True])
def test_a_tenth_of_the_evaluations_comes_within_two_percent_of_the_best(device: str, training: bool) -> None:
    p = problem(region(training=training), device)
    found = Search(p, replace(FAST, trials=len(p.space()) // 10)).run()
    assert len(found.order) <= len(p.space()) / 10
    best = min(p.predict(form) for form in p.space())
    assert found.timings[found.best].predicted_s <= 1.02 * best


def test_training_is_predicted_with_its_backward() -> None:
    forward, both = (problem(region(training=t), "h100") for t in (False, True))
    form = forward.space()[0]
    assert 2 < both.predict(form) / forward.predict(form) < 6 and forward.key != both.key


def made(**figures) -> Compiled:
    given = {"registers": 128, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 65536, "threads": 128, **figures}
    return Compiled(**given, instructions={})


def outcome(monkeypatch, found, device: str = "h100"):
    monkeypatch.setattr(recurrence, "compile_job", lambda job, *, folder: found)
    return problem(region(), device).compile(Chunked(64, 64, 4, 2))


def test_a_compiled_setting_that_spills_is_slower_and_one_that_does_not_fit_fails(monkeypatch) -> None:
    clean = outcome(monkeypatch, made()).seconds
    spilled = [outcome(monkeypatch, made(registers=255, spill_bytes=n)).seconds for n in (0, 64, 1024)]
    assert clean <= spilled[0] < spilled[1] < spilled[2]
    crowded = outcome(monkeypatch, made(shared_bytes=200 << 10)).seconds
    assert crowded > clean
    assert "no block fits an SM of h100" in outcome(monkeypatch, made(registers=300)).failure
    assert outcome(monkeypatch, Failure("no kernel")).failure == "no kernel"


def test_a_setting_compiles_for_a_gpu_that_is_not_here() -> None:
    p = problem(region(RecurrenceRule(decay="token", chunk=64)), "h100")
    found = p.compile(Chunked(32, 32, 4, 1))
    assert found.failure is None and 0.3 < found.seconds / p.predict(Chunked(32, 32, 4, 1)) < 4


def test_records_are_kept_under_the_regions_key_and_read_again(options: Options) -> None:
    p = problem(region(), "h100")
    assert tuned(region(), p.on, options.store) is None
    (record,) = tune([p], replace(FAST, trials=20), records=records_in(options.store))
    assert record.key == record_key(region(), p.on, "chunked") and record.default == p.space()[0].spell()
    form, held = tuned(region(), p.on, options.store)
    assert form.spell() == record.best and held.seconds == pytest.approx(record.timings[record.best].predicted_s)
    assert held.low < held.seconds < held.high


def test_a_record_is_taken_by_the_choice_which_says_so(options: Options) -> None:
    before = choose_recurrence(region(), options).choice
    (record,) = tune([problem(region(), "h100")], replace(FAST, trials=20), records=records_in(options.store))
    after = choose_recurrence(region(), options).choice
    assert before.reason.startswith("predicted") and after.reason.startswith("tuned")
    assert after.form == record.best and after.predicted_s <= before.predicted_s
    other = choose_recurrence(region(), replace(options, device="a100")).choice
    assert other.reason.startswith("predicted")


def test_a_measured_record_has_the_interval_of_its_repetitions(options: Options) -> None:
    where = region(**SMALL)
    p = problem(where, "cpu")
    (record,) = tune([p], replace(FAST, fidelity="measure"), records=records_in(options.store))
    assert set(record.timings) == {form.spell() for form in p.space()}
    assert record.timings[record.default].measured_s is not None
    form, held = tuned(where, p.on, options.store)
    assert form.spell() == record.best and held.seconds == record.timings[record.best].measured_s


def test_a_device_that_is_here_is_measured_and_others_are_compiled() -> None:
    assert dearest(["cpu"]) == "measure" and dearest(["h100"]) == "compile" and dearest(["cpu", "h100"]) == "compile"


RULES = {
    "gated delta": DELTA,
    "decay by channel": replace(DELTA, decay="channel", state_in=True),
    "low rank, packed": RecurrenceRule(decay="channel", low_rank=True, packed=True),
    "mLSTM": RecurrenceRule(decay="token", gate="exp", normaliser="max1", eps=1e-6, scale=0.35),
    "read before": RecurrenceRule(decay="channel", read="before"),
    "normalised": RecurrenceRule(decay="head", normaliser="sum", eps=1e-6),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_right_numbers_pass_the_check_of_a_measurement(rule: RecurrenceRule) -> None:
    bench = RecurrenceBench(region(rule, training=True, **SMALL), device_named("cpu"))
    assert bench.error(Chunked(32)) < 1e-4


def test_wrong_numbers_are_a_failure(monkeypatch) -> None:
    def wrong(self, given, rule, **kept):
        out, state = right(self, given, rule, **kept)
        return out * 1.01, state

    right = Chunked.run
    monkeypatch.setattr(Chunked, "run", wrong)
    found = problem(region(**SMALL), "cpu").measure(Chunked(32))
    assert found.failure is not None and "off by" in found.failure


class Mixer(torch.nn.Module):
    """A mixer that calls the delta rule of a library, as its models do."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(16, 4 * 8 * 3 + 2 * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from transformers.models.qwen3_next import modeling_qwen3_next as library

        B, L, _ = x.shape
        *qkv, g, beta = self.projection(x).split([32, 32, 32, 4, 4], -1)
        q, k, v = (t.view(B, L, 4, 8) for t in qkv)
        decay = -torch.nn.functional.softplus(g)
        rule = library.torch_chunk_gated_delta_rule
        out, _ = rule(q, k, v, decay, beta.sigmoid(), use_qk_l2norm_in_kernel=True)
        return out.flatten(2)


def model() -> tuple[Mixer, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Mixer().eval(), torch.randn(1, 70, 16)


def measured_as(self, form: Chunked) -> Outcome:
    """Times of chunks that do not depend on how busy this CPU is."""
    return Outcome(1e-4 if form.chunk_size == 16 else 1e-3, error=0.01)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> tuple[Plan, str]:
    """A plan for this CPU, whose chunks of 16 tokens are fastest, and the store of its records."""
    pytest.importorskip("transformers")
    store = str(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(RecurrenceProblem, "measure", measured_as)
        mixer, x = model()
        return attnc.autotune(mixer, x, device="cpu", options={"store": store}), store


@torch.no_grad()
def test_the_plan_holds_the_tuned_chunks_and_explain_says_so(planned) -> None:
    plan, store = planned
    (choice,) = plan.choices.values()
    assert choice.form == "chunked{chunk_size=16}" and choice.reason.startswith("tuned 100 us")
    assert plan.device == "cpu" and Plan.from_json(plan.to_json()) == plan
    mixer, x = model()
    report = explain(mixer, x, options={"store": store})
    (found,) = (r for r in report.regions if r.kind == "recurrence")
    assert found.choice.form == choice.form and "tuned" in str(report)


@torch.no_grad()
def test_the_backend_spells_the_chunks_of_the_plan_on_the_operator(planned, monkeypatch, tmp_path) -> None:
    graphs, apply = [], backend.apply_choices
    monkeypatch.setattr(backend, "apply_choices", lambda *given: graphs.append(apply(*given)) or graphs[-1])
    mixer, x = model()
    options = {"inner": "eager", "plan": planned[0], "store": str(tmp_path)}
    got = torch.compile(mixer, backend="attnc", options=options)(x)
    nodes = [n for g in graphs for n in g.graph.nodes if n.target is torch.ops.attnc.recurrence.default]
    assert [n.args[8].partition(" | ")[0] for n in nodes] == ["chunked{chunk_size=16}"]
    torch.testing.assert_close(got, mixer(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_is_tuned_for_a_gpu_that_is_not_here(options: Options) -> None:
    pytest.importorskip("transformers")
    mixer, x = model()
    given = {"device": "h100", "fidelity": "predict", "trials": 8, "options": {"store": options.store}}
    (choice,) = attnc.autotune(mixer.bfloat16(), x.bfloat16(), **given).choices.values()
    assert choice.name == "chunked" and choice.reason.startswith("tuned")
