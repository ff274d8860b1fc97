"""Every spelling of the gallery is recognised with its facts, and computes what eager computes."""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import attnc
from tests import gallery_modules
from tests.gallery import BY_NAME, GALLERY, disagreements
from tests.gallery_entry import Entry
from tests.gallery_run import RoundedTo, assert_same, attention, attnc_compiled, run

LIFTED = [entry for entry in GALLERY if entry.expect == "lifted"]
REFUSED = [entry for entry in GALLERY if entry.expect == "refused"]
VALUES = [entry for entry in GALLERY if entry.expect == "values"]
MODULES = {entry.name for entry in gallery_modules.ENTRIES}
DOUBLE = (
    "sdpa_is_causal", "product_matmul", "product_einsum_query_last", "scale_on_both",
    "softmax_by_hand_with_max", "apply_where", "means_window", "means_documents_causal",
    "gqa_expand_reshape", "mla_concatenated",
    "softcap_tanh", "bias_t5", "sink_column", "sink_sigmoid", "block_residual",
)


def by_name(entries, mark=()):
    """Parameters named after their entries; `mark` maps an entry to marks."""
    return [pytest.param(e, id=e.name, marks=mark(e) if mark else ()) for e in entries]


def slow_unless_module(entry: Entry):
    return () if entry.name in MODULES else pytest.mark.slow


def check(entry: Entry, backward: bool, dtype: torch.dtype | None = None, inner: str = "eager", **options):
    """Compare attnc with eager; in a given dtype, at the tolerance of the coarsest type the module rounds to.

    inner: eager where small regions are left as written, since then AOTAutograd would be given torch's own graph.
    """
    model, args = entry.make(dtype)
    rounded = RoundedTo()
    with rounded if dtype is not None else nullcontext():
        want = run(model, args, backward)
    model, args = entry.make(dtype)
    compiled = attnc_compiled(model, inner=inner, **options)
    got = run(compiled, args, backward, named=model)
    assert_same(got, want, rounded.coarsest)
    return attnc.last_report(compiled)


def check_facts(entry: Entry, report) -> None:
    regions = attention(report)
    reasons = [f"{item.anchor}: {item.reason}" for item in report.unmatched]
    assert len(regions) == entry.regions, f"{len(regions)} regions, stated {entry.regions}; {reasons}"
    wrong = [sentence for region in regions for sentence in disagreements(entry, region.facts)]
    assert not wrong, "; ".join(wrong)


def test_gallery_holds_at_least_seventy_five_spellings():
    assert len(LIFTED) >= 75


@pytest.mark.parametrize("entry", by_name(LIFTED))
def test_spelling_is_recognised_and_equals_eager(entry):
    check_facts(entry, check(entry, backward=entry.train))


@pytest.mark.parametrize("entry", by_name((e for e in LIFTED if e.train), slow_unless_module))
def test_spelling_is_recognised_without_gradients(entry):
    check_facts(entry, check(entry, backward=False, inner="aot_eager"))


@pytest.mark.parametrize("name", DOUBLE)
def test_spelling_is_recognised_in_double_precision(name):
    entry = BY_NAME[name]
    check_facts(entry, check(entry, backward=entry.train, dtype=torch.float64))


BLOCKED, FLEX = "block_sparse{provider=blocked,block_m=64,block_n=64}", "block_sparse{provider=flex}"
EACH_FORM = (  # of every kind of mask, bias, sink and heads one; the others are tried in every form by the slow sweep
    "means_window", "means_documents_causal", "means_prefix_from_lengths", "means_causal_and_padding",
    "means_block_table", "means_head_dependent_window", "means_left_padding_finfo", "bias_t5", "bias_learned",
    "sink_column", "sink_sigmoid", "gqa_expand_reshape", "gqa_group_in_rows",
)


def forced():
    for entry in LIFTED:
        if entry.name.startswith(("means_", "bias_", "sink_", "gqa_")):
            for form in ("dense", BLOCKED, FLEX):
                marks = () if form == "dense" or entry.name in EACH_FORM else pytest.mark.slow
                yield pytest.param(entry, form, id=f"{entry.name}-{form}", marks=marks)


@pytest.mark.parametrize(("entry", "form"), list(forced()))
def test_forced_form_equals_eager(entry, form):
    inner = "eager" if form == "dense" and entry.name not in EACH_FORM else "aot_eager"
    report = check(entry, backward=entry.train and "flex" not in form, inner=inner, force=form)
    for region in attention(report):
        assert region.choice.rewrites or len(region.choice.reason.split()) > 5


@pytest.mark.parametrize("entry", by_name(VALUES))
def test_unusual_spelling_equals_eager(entry):
    check(entry, backward=entry.train)


@pytest.mark.parametrize("entry", by_name(REFUSED))
def test_core_whose_probabilities_are_read_elsewhere_is_left_with_a_reason(entry):
    report = check(entry, backward=entry.train)
    regions = attention(report)
    reasons = [item.reason for item in report.unmatched]
    reasons += [sentence for region in regions for sentence in (*region.choice.refused.values(), region.choice.reason)]
    assert any(len(reason.split()) > 3 for reason in reasons), f"no sentence says why: {reasons}"


@pytest.mark.parametrize("entry", by_name(REFUSED))
def test_explain_gives_the_reason_without_compiling(entry):
    model, args = entry.make()
    with torch.no_grad():
        report = attnc.explain(model, *args)
    assert report.unmatched or attention(report)


@pytest.mark.parametrize("name", ["product_matmul", "means_window", "two_blocks", "weights_returned"])
def test_explain_and_compile_agree(name):
    model, args = BY_NAME[name].make()
    with torch.no_grad():
        explained = attnc.explain(model, *args)
        compiled = attnc_compiled(model)
        compiled(*args)
    ran = attnc.last_report(compiled)
    assert [r.facts["mask"] for r in attention(explained)] == [r.facts["mask"] for r in attention(ran)]


def test_region_path_names_the_module_that_holds_the_core():
    model, args = BY_NAME["two_blocks"].make()
    with torch.no_grad():
        paths = [region.path for region in attention(attnc.explain(model, *args))]
    assert [path.split(".")[-3:] for path in paths] == [["layers", str(at), "attention"] for at in range(2)]
