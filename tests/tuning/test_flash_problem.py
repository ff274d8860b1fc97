"""Kernels of a region as problems: found, compiled for a GPU that is not here, kept, and picked up by the choice."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import attnc
from attnc.codegen.compile_stats import Failure
from attnc.errors import UsageError
from attnc.forms.flash import Flash
from attnc.options import Options
from attnc.passes.choose import choose
from attnc.plan import Plan
from attnc.region import AS_WRITTEN, AttentionRegion, Choice
from attnc.rule_attention import AttentionRule, AttentionShape
from attnc.tuned import record_key, records_in, tuned
from attnc.tuning import flash
from attnc.tuning.flash import slots_of
from attnc.tuning.problems import problems_in
from attnc.tuning.search import Search, Settings
from attnc.tuning.tune import tune


def region(keep: str = "j - i <= 0 and i - j <= 511", L: int = 4096, **facts) -> AttentionRegion:
    rule = AttentionRule.parse(f"score=0.125 * s; keep={keep}")
    shape = AttentionShape(1, 8, 2, L, L, 64, 64)
    facts = {"shape": shape, "written": "sdpa", "dtype": "bfloat16", "device": "cpu", **facts}
    return AttentionRegion(path="layers.0", node="sdpa", rule=rule, **facts)


@pytest.fixture
def options(tmp_path) -> Options:
    return Options(device="h100", store=str(tmp_path))


def test_each_kernel_is_a_problem_of_its_own() -> None:
    assert [p.part for p in problems_in([region()], ["h100"])] == ["forward"]
    assert [p.part for p in problems_in([region(training=True)], ["h100"])] == ["forward", "dq", "dkv"]
    one_row = region("j - i <= 4095", shape=AttentionShape(1, 8, 2, 1, 4096, 64, 64))
    assert [p.part for p in problems_in([one_row], ["a100"])] == ["decode"]
    assert len({p.key for p in problems_in([region(), region(L=8192)], ["h100", "a100"])}) == 2


def test_what_flash_cannot_compute_is_no_problem() -> None:
    assert problems_in([region(dtype="float64")], ["h100"]) == []


def test_a_region_that_nothing_may_replace_is_no_problem() -> None:
    kept = Choice(AS_WRITTEN, "its weights are also read by sum_1")
    assert problems_in([region(choice=kept)], ["h100"]) == []
    assert problems_in([region(choice=Choice(AS_WRITTEN, "slower", offers={"flash": 1.0}))], ["h100"])


def test_captured_tensors_are_read_from_the_facts() -> None:
    slots = slots_of(region(captured=("float32[8]", "int64[1, 4096]")), "dq")
    assert [(str(s.dtype), s.rank, s.needs_grad) for s in slots] == [
        ("torch.float32", 1, True),
        ("torch.int64", 2, False),
    ]


@pytest.mark.parametrize("device", ["h100", "mi300x"])
def test_a_setting_compiles_for_a_gpu_that_is_not_here(device: str) -> None:
    (problem,) = problems_in([region()], [device])
    found = problem.compile(problem.space()[0])
    assert found.failure is None and found.seconds is not None
    assert 0.3 < found.seconds / problem.predict(problem.space()[0]) < 4


def test_what_is_compiled_is_kept_in_the_store_of_the_problem(tmp_path, monkeypatch) -> None:
    folders = []
    monkeypatch.setattr(flash, "compile_job", lambda job, *, folder: (folders.append(folder), Failure("none"))[1])
    for store in (None, str(tmp_path)):
        (problem,) = problems_in([region()], ["h100"], store)
        problem.compile(problem.space()[0])
    assert folders == [None, tmp_path / "compiled"]
    assert len({record_key(p.region, p.gpu, p.part) for p in problems_in([region()], ["h100"], "/a")}) == 1


def test_a_gpu_without_a_triton_target_is_refused_with_a_sentence() -> None:
    with pytest.raises(UsageError, match="v100: it has no target of Triton's"):
        problems_in([region()], ["v100"])


def test_measuring_a_gpu_that_is_not_here_records_nothing(options: Options) -> None:
    problems = problems_in([region()], ["h100"])
    records = records_in(options.store)
    with pytest.raises(UsageError, match="found no such GPU here"):
        tune(problems, Settings(trials=3, fidelity="measure", storage="memory"), records=records)
    kept = records.find(record_key(region(), problems[0].gpu, "forward"))
    assert kept is None or not any(timing.failure for timing in kept.timings.values())


def test_records_are_picked_up_by_the_choice(options: Options) -> None:
    before = choose(region(), options).choice
    assert before is not None and before.name == "flash" and not before.reason.startswith("tuned")
    problems = problems_in([region()], ["h100"])
    settings = Settings(trials=60, fidelity="predict", storage="memory")
    (record,) = tune(problems, settings, records=records_in(options.store))
    assert record.key == record_key(region(), problems[0].gpu, "forward")
    after = choose(region(), options).choice
    assert after is not None and after.reason.startswith("tuned")
    assert after.form == record.best and after.predicted_s <= before.predicted_s


def test_records_of_training_join_three_kernels(options: Options) -> None:
    where = region(training=True)
    problems = problems_in([where], ["h100"])
    assert tuned(where, problems[0].gpu, options.store) is None
    tune(problems, Settings(trials=20, fidelity="predict", storage="memory"), records=records_in(options.store))
    found = tuned(where, problems[0].gpu, options.store)
    assert found is not None and isinstance(found[0], Flash)
    whole = found[0].seconds(where, problems[0].gpu)
    assert found[1].seconds == pytest.approx(whole, rel=0.05)
    assert found[1].low < whole < found[1].high


def test_a_plan_decides_by_path_and_says_so(options: Options) -> None:
    plan = Plan({"layers.0": Choice("flash{block_m=64,block_n=64}", "by hand")}, "h100")
    chosen = choose(region(), Options(device="h100", store=options.store, plan=plan)).choice
    assert (
        chosen is not None and chosen.form == "flash{block_m=64,block_n=64}" and "by the plan for h100" in chosen.reason
    )


def test_a_plan_that_does_not_apply_leaves_the_region(options: Options) -> None:
    plan = Plan({"layers.0": Choice("flash_decode", "by hand")}, "h100")
    chosen = choose(region(), Options(device="h100", store=options.store, plan=plan)).choice
    assert chosen is not None and not chosen.rewrites and "at most 16 query rows" in chosen.reason


def test_a_device_of_a_file_is_tuned_and_chosen_for_under_its_name_wherever_the_file_lies(options, tmp_path) -> None:
    found = []
    for folder in ("a", "b"):
        file = tmp_path / folder / "own.toml"
        file.parent.mkdir()
        file.write_text('[mine]\nlike = "h100"\ntitle = "Mine"\nsource = { figures = "me" }\n')
        (problem,) = problems_in([region()], [str(file)])
        settings = Settings(trials=20, fidelity="predict", storage="memory")
        (record,) = tune([problem], settings, records=records_in(options.store))
        choice = choose(region(), Options(device=f"{file}:mine", store=options.store)).choice
        plan = Plan({"layers.0": choice}, problem.device)
        taken = choose(region(), Options(device=str(file), store=str(tmp_path / folder), plan=plan)).choice
        assert "by the plan for mine" in taken.reason
        found.append((record.key, choice.form))
    assert found[0] == found[1] and found[0][0].device == "mine" and choice.reason.startswith("tuned")


def test_autotune_returns_a_plan_and_keeps_records(options: Options) -> None:
    class Attend(torch.nn.Module):
        def forward(self, x):
            distance = torch.arange(x.shape[2])[:, None] - torch.arange(x.shape[2])
            return F.scaled_dot_product_attention(x, x, x, attn_mask=(distance >= 0) & (distance < 64))

    x = torch.randn(1, 2, 2048, 64, dtype=torch.bfloat16)
    plan = attnc.autotune(Attend(), x, device="h100", trials=10, fidelity="predict", options={"store": options.store})
    (choice,) = plan.choices.values()
    assert plan.device == "h100" and choice.name == "flash" and choice.reason.startswith("tuned")
    assert Plan.from_json(plan.to_json()) == plan


# Of the attentions of benchmarks/search_kernels.py two with few fast settings: 2 of 616, 4 of 432.
FEW_ARE_FAST = [
    ("j - i <= 0", AttentionShape(1, 16, 16, 4096, 4096, 192, 128), "mi300x"),
    ("j - i <= 2047", AttentionShape(4, 32, 32, 2048, 2048, 128, 128), "mi300x"),
]


@pytest.mark.parametrize(("keep", "shape", "gpu"), FEW_ARE_FAST, ids=["192-128", "128"])
def test_a_tenth_of_a_space_with_few_fast_settings_is_enough(keep: str, shape: AttentionShape, gpu: str) -> None:
    (problem,) = problems_in([region(keep, shape=shape)], [gpu])
    space = problem.space()
    asked = Settings(trials=len(space) // 10, fidelity="predict", storage="memory")
    found = Search(problem, asked).run()
    best = found.timings[found.best or ""].predicted_s
    assert best is not None and best <= 1.02 * min(map(problem.predict, space))
