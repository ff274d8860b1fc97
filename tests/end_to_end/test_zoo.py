"""Real architectures: 25 of shared/zoo/public.json, each attention core found, outputs and gradients as eager.

Chosen by a fixed seed, one category after the other. The dense form is forced, so that every region that may be
rewritten is: at the zoo's sizes the cost rule would leave them all.
"""
from __future__ import annotations

import importlib
import json
import os
import random
import sys
from contextlib import contextmanager

import pytest
import torch

import attnc
from tests.conftest import ROOT
from tests.gallery_run import attention, attnc_compiled

ZOO = ROOT.parent / "shared" / "zoo"
if not ZOO.is_dir():
    pytest.skip(f"the model zoo is absent: put the shared folder beside the clone (looked in {ZOO})",
                allow_module_level=True)
pytest.importorskip("transformers", reason="needs transformers: pip install attnc[dev]")

SEED, HOW_MANY = 20, 25
RTOL = 1e-4
QUICK = {("granite", "sdpa", "pad"), ("marian", "eager", "pad"),
         ("layoutlm", "sdpa", "none")}
TRAINED = ("eurobert", "granite", "deberta", "marian", "mimo_v2_flash", "unispeech")  # no hard choices to flip
MODELS = json.loads((ZOO / "public.json").read_text())["models"]


def chosen() -> list[str]:
    """Architectures with attention, drawn from each category in turn."""
    categories: dict[str, list[str]] = {}
    for name, entry in sorted(MODELS.items()):
        if entry["n_attention_cores"] and entry["status"] == "ok":
            categories.setdefault(entry["category"], []).append(name)
    rng = random.Random(SEED)
    for _, names in sorted(categories.items()):
        rng.shuffle(names)
    rounds = range(max(map(len, categories.values())))
    drawn = [names[at] for at in rounds for _, names in sorted(categories.items()) if at < len(names)]
    return drawn[:HOW_MANY]


CHOSEN = chosen()


@contextmanager
def importable():
    """The zoo's own modules by name; nothing is written beside them."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(ZOO))
    try:
        yield
    finally:
        sys.path.remove(str(ZOO))
        sys.dont_write_bytecode = before


@pytest.fixture(scope="module")
def zoo():
    """(build, outputs, compare) of the zoo."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with importable():
        build, capture = importlib.import_module("zoo_build"), importlib.import_module("zoo_capture")

    def make(name, attn, mask, train=False):
        return build.build(build.catalog()[name], attn=attn, mask=mask, train=train)

    return make, build.outputs, capture.compare


def runs():
    for name in CHOSEN:
        for attn in ("eager", "sdpa") if MODELS[name]["sdpa_ok"] else ("eager",):
            for mask in ("none", "pad") if MODELS[name].get("chains_pad") else ("none",):
                marks = () if (name, attn, mask) in QUICK else pytest.mark.slow
                yield pytest.param(name, attn, mask, id=f"{name}-{attn}-{mask}", marks=marks)


def assert_all_found(report, name: str) -> None:
    paths = [f"{region.path} ({region.mask})" for region in attention(report)]
    reasons = [f"{item.path} {item.anchor}: {item.reason}" for item in report.unmatched]
    truth = MODELS[name]["n_attention_cores"]
    assert len(paths) == truth, f"{len(paths)} regions of {truth}: {paths}; {reasons}; {report.problems}"


def is_equal(compared: dict) -> bool:
    return compared["same_structure"] and compared["rel"] is not None and compared["rel"] <= RTOL


def test_the_choice_covers_every_category():
    assert len(CHOSEN) == HOW_MANY
    assert {MODELS[name]["category"] for name in CHOSEN} == {entry["category"] for entry in MODELS.values()}
    assert {name for name, _, _ in QUICK} | set(TRAINED) <= set(CHOSEN)


@pytest.mark.parametrize(("name", "attn", "mask"), list(runs()))
def test_every_core_is_found_and_outputs_are_those_of_eager(zoo, name, attn, mask):
    make, outputs, compare = zoo
    built = make(name, attn, mask)

    def run(model):
        torch.manual_seed(0)
        with torch.no_grad():
            return [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in outputs(model(**built.inputs))]

    compiled = attnc_compiled(built.model, force="dense")
    got = run(compiled)
    assert_all_found(attnc.last_report(compiled), name)
    compared = compare(run(built.model), got)
    if not is_equal(compared):  # some differences are the library's own
        torch._dynamo.reset()
        compared = compare(run(torch.compile(built.model, backend="eager")), got)
    assert is_equal(compared), compared


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_eager(zoo, name):
    make, outputs, compare = zoo
    built = make(name, "eager", "none", train=True)

    def gradients(model):
        torch.manual_seed(0)
        built.model.zero_grad(set_to_none=True)
        loss = sum(x.float().square().mean() for x in outputs(model(**built.inputs)) if x.requires_grad)
        loss.backward()
        return [p.grad.clone() for p in built.model.parameters() if p.grad is not None]

    want = gradients(built.model)
    compiled = attnc_compiled(built.model, force="dense")
    compared = compare(want, gradients(compiled), floor=1e-3)
    assert_all_found(attnc.last_report(compiled), name)
    assert is_equal(compared), compared
