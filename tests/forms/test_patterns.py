"""The narrowed family: each pattern is its mask written as loops, run by an exact form, exact when it keeps all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnc
from attnc import ops
from attnc.cost_models.device import device_named, gpu_named
from attnc.errors import UsageError
from attnc.expr import INT, Expr, H, const, load, sub
from attnc.expr_text import parse
from attnc.forms import FORMS, parse_form
from attnc.forms.bigbird import BigBird
from attnc.forms.dense import Dense
from attnc.forms.flash import Flash
from attnc.forms.masked import reference
from attnc.forms.narrowed import Frame, Narrowed, frame_of, region_of
from attnc.operands import Operands
from attnc.predicate import conjunction
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.forms.patterns import SETTINGS, Setting, counted
from tests.forms.rules import Dims, inputs, rule_of

CPU, H100 = device_named("cpu", 2), gpu_named("h100")
SHIFTED = tuple(s for s in SETTINGS if not s.only)
each = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.spelling)
causal_too = pytest.mark.parametrize("setting", SHIFTED, ids=lambda s: s.spelling)


def form_of(spelling: str) -> Narrowed:
    form = parse_form(spelling)
    assert isinstance(form, Narrowed)
    return form


def operands(dims: Dims, rule: str | AttentionRule, dtype: torch.dtype = torch.float64, *, grad: bool = False):
    torch.manual_seed(dims.L + dims.S)
    qkv, captured = inputs(dims, dtype, grad=grad)
    return Operands(*qkv, captured, [], rule if isinstance(rule, AttentionRule) else rule_of(rule, dims))


def run(spelling: str, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, rule = given
    return ops.attention(*tensors, f"{spelling} | {rule.spell()}")


def by_loops(setting: Setting, given: Operands, causal: bool) -> torch.Tensor:
    """The attention under the mask of `setting`, spelled out: rows without keys give 0."""
    key, value = (t.repeat_interleave(given.group, 1) for t in (given.key, given.value))
    count = counted(setting, given.query.shape[2], given.query.shape[1], causal)
    weight = (0.25 * given.query @ key.mT).exp() * count
    total = weight.sum(-1, keepdim=True)
    return weight @ value / torch.where(total == 0, 1.0, total)


def region(L: int = 4096, S: int = 0, rule: str = "keep=j - i <= 0", score: str = "0.125 * s", **facts):
    facts = {"written": "sdpa", "dtype": "float32", "device": "cpu", **facts}
    shape = AttentionShape(1, 8, 2, L, S or L, 64, 64)
    return AttentionRegion("layer", "sdpa", AttentionRule.parse(f"score={score}; {rule}"), shape, **facts)


@each
def test_a_pattern_is_its_mask_written_as_loops(setting: Setting) -> None:
    for length in setting.lengths:
        dims = Dims(length, length, 6, 3, 8, 8)
        for rule in ("plain", "causal") if not setting.only else (setting.only,):
            given = operands(dims, rule, grad=True)
            out = run(setting.spelling, given)[0]
            expected = by_loops(setting, given, rule == "causal")
            off_by = 1e-7 if "segments" in setting.spelling else 1e-11  # logarithms of integers are float32
            torch.testing.assert_close(out, expected, rtol=0.0, atol=off_by)
            slope = torch.randn_like(out)
            found, wanted = (torch.autograd.grad(x, given[:3], slope) for x in (out, expected))
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0.0, atol=10 * off_by)


@causal_too
def test_a_form_equals_its_reference_under_every_rule(setting: Setting) -> None:
    form, length = form_of(setting.spelling), setting.lengths[0]
    for rule in ("softcap", "sink", "documents", "causal_padding", "bias"):
        given = operands(Dims(length, length, 6, 3, 8, 8), rule)
        out, lse = run(setting.spelling, given)
        expected, height = form.reference(given)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lse, height, rtol=1e-10, atol=1e-12)


@causal_too
def test_decoding_equals_the_last_rows_of_prefill(setting: Setting) -> None:
    length = 70
    if setting.lengths != (33, 70, 200):
        pytest.skip("a grid has no cache")
    given = operands(Dims(length, length, 6, 3, 8, 8), "causal")
    whole = run(setting.spelling, given)[0]
    for rows, keep in ((1, "empty=never"), (1, "keep=j - i <= 69"), (5, "keep=j - i <= 65"), (5, "keep=j - i <= n0")):
        rule = AttentionRule.parse(f"score=0.25 * s; {keep}")
        late = given._replace(query=given.query[:, :, -rows:], rule=rule, sizes=[length - rows])
        torch.testing.assert_close(run(setting.spelling, late)[0], whole[:, :, -rows:], rtol=1e-10, atol=1e-12)


def test_a_longer_cache_than_is_filled_is_no_position() -> None:
    given = operands(Dims(70, 70, 4, 2), "causal")
    whole = run("sinks_window{sinks=2,window=8}", given)[0]
    padded = [torch.cat([t, torch.randn_like(t)], 2) for t in given[1:3]]
    rule = AttentionRule.parse("score=0.25 * s; keep=j - i <= n0")
    late = Operands(given.query[:, :, -1:], *padded, given.captured, [69], rule)
    out = run("sinks_window{sinks=2,window=8}", late)[0]
    torch.testing.assert_close(out, whole[:, :, -1:], rtol=1e-10, atol=1e-12)


@causal_too
def test_a_later_token_never_changes_an_earlier_output(setting: Setting) -> None:
    length = setting.lengths[1] if len(setting.lengths) > 1 else setting.lengths[0]
    given = operands(Dims(length, length, 6, 3, 8, 8), "causal")
    before = run(setting.spelling, given)[0]
    for at in (15, 40):
        changed = [t.clone() for t in given[:3]]
        for t in changed:
            t[:, :, at:] = torch.randn_like(t[:, :, at:])
        after = run(setting.spelling, given._replace(query=changed[0], key=changed[1], value=changed[2]))[0]
        torch.testing.assert_close(after[:, :, :at], before[:, :, :at], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.whole], ids=lambda s: s.whole)
def test_knobs_that_keep_everything_are_exact(setting: Setting) -> None:
    form = form_of(setting.whole)
    for length in setting.lengths:
        for rule in ("plain", "causal", "documents"):
            given = operands(Dims(length, length, 6, 3, 8, 8), rule)
            torch.testing.assert_close(run(setting.whole, given)[0], reference(given)[0], rtol=1e-10, atol=1e-12)
            where = region(length)
            where = replace(where, rule=given.rule, shape=replace(where.shape, Hq=6, H=3))
            assert form.is_exact(where) and not form_of(setting.spelling).is_exact(where), (length, rule)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.wider], ids=lambda s: s.wider)
def test_more_budget_never_removes_a_key(setting: Setting) -> None:
    length = setting.lengths[-1]
    for rule in ("plain", "causal"):
        given = operands(Dims(length, length, 6, 3, 8, 8), rule)
        few, many = (kept(form_of(s), given) for s in (setting.spelling, setting.wider))
        assert not bool((few & ~many).any()) and bool((many & ~few).any())


def kept(form: Narrowed, given: Operands) -> torch.Tensor:
    at = frame_of(region_of(given))
    assert isinstance(at, Frame)
    keep = given.tensor(conjunction(given.rule.keep, form.pattern(at)))
    return keep.expand(*given.query.shape[:3], given.key.shape[2])


def one_of_each_form():
    """The first setting of each form; the others are slow."""
    seen: set[str] = set()
    for setting in SETTINGS:
        name = setting.spelling.partition("{")[0]
        yield pytest.param(setting, id=setting.spelling, marks=pytest.mark.slow if name in seen else ())
        seen.add(name)


@pytest.mark.parametrize("setting", list(one_of_each_form()))
def test_it_runs_compiled_with_gradients(setting: Setting) -> None:
    dims = Dims(setting.lengths[0], setting.lengths[0], 6, 3, 8, 8)
    given = operands(dims, "plain" if setting.only else "causal", torch.float32, grad=True)
    spelling, (_, *rest, _) = f"{setting.spelling} | {given.rule.spell()}", given

    def attend(query: torch.Tensor) -> torch.Tensor:
        return torch.ops.attnc.attention(query, *rest, spelling)[0]

    out, expected = torch.compile(attend, backend="aot_eager")(given.query), run(setting.spelling, given)[0]
    torch.testing.assert_close(out, expected)
    one, other = (torch.autograd.grad(x.sum(), given.query)[0] for x in (out, expected))
    torch.testing.assert_close(one, other)


def test_through_the_backend_a_pattern_is_taken_where_its_name_is_allowed() -> None:
    q, k, v = (torch.randn(1, heads, 96, 16) for heads in (4, 2, 2))

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    spelling = "sinks_window{sinks=2,window=8}"
    options = {"allow": [spelling], "force": spelling, "inner": "aot_eager", "strict": True}
    fast = torch.compile(attend, backend="attnc", options=options)
    with torch.no_grad():
        out = fast(q, k, v)
    choice = attnc.last_report(fast).regions[0].choice
    assert choice.form == spelling and "approximate: error" in choice.reason
    rule = AttentionRule.parse("score=0.25 * s; keep=j <= i and (j < 2 or i - j < 8)")
    torch.testing.assert_close(out.double(), reference(Operands(q, k, v, [], [], rule).double())[0], rtol=0, atol=1e-5)


# Golden files.


GOLDEN = {
    "streaming_llm/n64_s4_w20_grad": ("sinks_window{sinks=4,window=20}", "keep=j <= i"),
    "streaming_llm/n200_s8_w40": ("sinks_window{sinks=8,window=40}", "keep=j <= i"),
    "minference_a_shape/n120_v30_s50": ("sinks_window{sinks=30,window=51}", "keep=j <= i"),
    "longformer/n96_w16_grad": ("longformer{window=16,globals=0}", ""),
    "neighborhood_attention/1d_n64_k7_grad": ("neighborhood{kernel=7}", ""),
    "neighborhood_attention/1d_n100_k9_dil3_causal": ("neighborhood{kernel=9,dilation=3}", "keep=j <= i"),
    "neighborhood_attention/2d_12x10_k5x3": ("neighborhood{grid=12x10,kernel=5x3}", ""),
}


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted.double()).abs().max() / wanted.double().abs().max())


def against(file, form: Narrowed, rule: AttentionRule, captured: list[torch.Tensor]) -> None:
    qkv = [file.inputs[name].double().requires_grad_() for name in "qkv"]
    out = form.cpu(Operands(*qkv, captured, [], rule))[0]
    assert off(out, file.outputs["out"]) < 2e-7
    if "cot_out" in file.tensors:
        grads = torch.autograd.grad(out, qkv, file.tensors["cot_out"].double())
        for name, grad in zip("qkv", grads, strict=True):
            assert off(grad, file.tensors[f"grad_{name}"]) < 2e-7, name


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors_are_reproduced(name: str, golden) -> None:
    spelling, keep = GOLDEN[name]
    against(golden(name), form_of(spelling), AttentionRule.parse(f"score=0.25 * s; {keep}"), [])


def test_rows_of_longformer_that_share_their_projections_are_reproduced(golden) -> None:
    file = golden("longformer/n128_w32_global3")
    qkv = [file.inputs[name].double() for name in "qkv"]
    given = Operands(*qkv, [], [], AttentionRule.parse("score=0.25 * s"))
    out = form_of("longformer{window=32,globals=2}").cpu(given)[0]
    rows = [i for i in range(61, 94) if i != 77]  # the third global token lies in their windows
    assert off(out[:, :, rows], file.outputs["out"][:, :, rows]) < 2e-7


class Planned(BigBird):
    """BigBird with the blocks of a plan, captured: (heads, blocks - 2, random), for rows but the first and last."""

    def drawn(self, row: Expr, at: Frame) -> list[Expr]:
        return [load(0, (H, sub(row, const(1)), const(k)), INT) for k in range(self.random)]


@pytest.mark.parametrize(("case", "block", "random"), [("n128_b8_r2_grad", 8, 2), ("n192_b16_r1", 16, 1)])
def test_golden_vectors_of_bigbird_are_reproduced_with_their_plan(case: str, block: int, random: int, golden) -> None:
    file = golden(f"bigbird_block_sparse/{case}")
    plan = file.inputs["rand_blocks"].long()
    against(file, Planned(block=block, random=random), AttentionRule.parse("score=0.25 * s"), [plan])


# The draw of BigBird.


def test_bigbird_draws_blocks_that_are_there_and_differ() -> None:
    given = operands(Dims(192, 192, 4, 2), "plain")
    none = kept(form_of("bigbird{block=8,random=0}"), given)
    for spelling in ("bigbird{block=8}", "bigbird{block=8,draws=head}", "bigbird{block=8,seed=2}"):
        more = kept(form_of(spelling), given) & ~none
        blocks = more.view(2, 4, 24, 8, 24, 8).any(5).any(3)
        assert torch.equal(blocks.repeat_interleave(8, 2).repeat_interleave(8, 3), more)
        assert 1.5 < float(blocks[:, :, 1:-1].sum(-1).double().mean()) <= 3  # of three, some are kept already
        assert bool((blocks[0, 0] != blocks[0, 1]).any()) == ("head" in spelling)
    one, other = (kept(form_of(f"bigbird{{block=8,seed={n}}}"), given) for n in (1, 2))
    assert bool((one != other).any())


def test_under_a_causal_mask_bigbird_draws_the_same_blocks_at_every_length() -> None:
    short, long = (kept(form_of("bigbird{block=8}"), operands(Dims(n, n), "causal")) for n in (96, 192))
    assert torch.equal(short, long[:, :, :96, :96])


# Refusals.


@pytest.mark.parametrize(
    ("spelling", "where", "says"),
    [
        ("sliding_window", region(rule="dropout=0.1"), "dropout 0.1"),
        ("sliding_window", region(64, 128, rule="empty=never"), "64 queries of 128 keys without a causal mask"),
        ("sinks_window", region(128, 64), "more queries than keys, 128 x 64"),
        ("block_local{shift=head}", region(), "attends to other blocks than the own one"),
        ("neighborhood{grid=12x10,kernel=3}", region(), "of 120 tokens, found 4096 queries of 4096 keys"),
        ("neighborhood{grid=64x64,kernel=3x3x3}", region(), "found 3 for 2"),
        ("neighborhood{kernel=7}", region(5, rule="empty=never"), "found 7 keys 1 apart in a dimension of 5"),
        ("neighborhood{kernel=7,stride=9}", region(), "found 9 for 7"),
        ("dilated_segments{segments=10/3}", region(), "found 10/3"),
        ("spans{heads=1/2:1/3:1/4}", region(), "found 3 entries for 8 heads"),
    ],
)
def test_a_refusal_is_a_sentence(spelling: str, where: AttentionRegion, says: str) -> None:
    why = form_of(spelling).refuse(where)
    assert why is not None and says in why and why.endswith(".")


def test_symbolic_lengths_are_refused_by_patterns_that_count_keys_alone() -> None:
    where = region()
    moving = replace(where, shape=replace(where.shape, symbols={"L": "s0", "S": "s0"}))
    assert "dynamic=False" in form_of("neighborhood{grid=64x64,kernel=7}").refuse(moving)
    assert "percentage" in form_of("spans{heads=4/64+5%:all}").refuse(moving)
    assert form_of("spans{heads=4/64:all}").refuse(moving) is None
    assert form_of("sliding_window").refuse(moving) is None and not form_of("sliding_window").is_exact(moving)
    for spelling in ("sliding_window", "sinks_window", "longformer", "neighborhood{grid=64x64,kernel=7}"):
        for one in (where, region(rule="empty=never"), replace(where, training=True), replace(where, device="cuda")):
            assert form_of(spelling).refuse(one) is None
    assert form_of("sinks_window").refuse(region(1, 4096, rule="empty=never")) is None


@pytest.mark.parametrize(
    "spelling", ["neighborhood{grid=12y10}", "spans{heads=4}", "dilated_segments{segments=8}", "strided{mode=both}"]
)
def test_a_knob_that_is_a_text_says_what_it_is(spelling: str) -> None:
    with pytest.raises(UsageError, match=r"allowed is .*\. Leave"):
        parse_form(spelling)


# What runs it.


def test_a_window_at_32k_is_predicted_to_pay() -> None:
    for device, facts in ((CPU, {}), (H100, {"device": "cuda", "dtype": "bfloat16"})):
        for spelling in ("sliding_window", "sinks_window", "spans", "block_local", "bigbird"):
            where, form = region(32768, **facts), form_of(spelling)
            assert form.seconds(where, device) < 0.25 * Dense().seconds(where, device), (spelling, device.name)
            assert form.estimate(where, device).seconds == form.seconds(where, device)


def test_on_a_gpu_the_flash_kernel_runs_the_narrowed_rule() -> None:
    where = region(32768, device="cuda", dtype="bfloat16")
    form, narrowed = form_of("sinks_window{sinks=4,window=512}").lowered(where, H100)
    assert isinstance(form, Flash) and narrowed.rule.keep == parse("j <= i and (j <= 3 or i - j <= 511)")
    assert form.refuse(narrowed) is None and narrowed.rule.empty == "never"
    one, _ = form_of("sinks_window").lowered(region(1, 32768, rule="empty=never", device="cuda"), H100)
    assert one.name in ("flash", "flash_decode")


def test_strides_of_whole_tiles_are_skipped() -> None:
    form = form_of("strided{stride=512}")
    assert form.seconds(region(16384), CPU) < 0.5 * Dense().seconds(region(16384), CPU)


def test_rows_that_only_the_pattern_empties_give_nothing_and_the_rest_what_the_rule_says() -> None:
    base = region(rule="keep=j - i <= 0")
    for rule, spelling, empty in (
        (base.rule, "sliding_window", "never"),
        (base.rule, "dilated_segments{segments=64/2}", "zero"),
        (AttentionRule.parse("score=s; keep=j - i <= 0 and t0[b, j] == 1; empty=nan"), "sliding_window", "zero"),
        (AttentionRule.parse("score=s; keep=j - i <= 0 and t0[b, j] == 1; empty=mean"), "sliding_window", "mean"),
    ):
        assert form_of(spelling).narrow(replace(base, rule=rule)).rule.empty == empty


def test_settings_are_few_enough_to_be_measured() -> None:
    for form in (f for f in FORMS if issubclass(f, Narrowed)):
        count = 1
        for knob in form().knobs().values():
            assert knob.role == "semantic"
            count *= len(knob.choices)
        assert count <= 120, form.name
