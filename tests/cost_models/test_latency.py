"""Latency models: what holds for every shape and device, whatever the fitted constants."""

from __future__ import annotations

import json
import math
from importlib.resources import files

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnc.cost_models.device import device_named, gpu_named
from attnc.cost_models.latency import KINDS, MODELS, figures_of, figures_of_sheet, predict
from attnc.cost_models.latency.matrix_units import of_class
from attnc.errors import UsageError

MEASURED_PARTS = ("a100", "h100", "rtxpro6000")
OTHER_PARTS = ("h200", "b200", "l40s", "l4", "rtx5090", "mi300x", "a10g", "h20", "b300", "mi355x", "max1550")
ATTENTION = {"dtype": "bf16", "batch": 4, "q_heads": 16, "kv_heads": 4, "head_dim": 128, "window": 0}
SHAPES: dict[str, dict] = {
    "attn_prefill": {**ATTENTION, "seq_q": 2048},
    "attn_decode": {**ATTENTION, "seq_q": 1, "seq_kv": 4096},
    "attn_encoder": {"dtype": "bf16", "batch": 4, "seq_q": 1024, "q_heads": 16, "head_dim": 72},
    "mla_prefill": {
        "dtype": "bf16", "batch": 2, "seq_q": 2048, "q_heads": 16, "head_dim_qk": 192, "head_dim_v": 128,
    },
    "mla_decode": {
        "dtype": "bf16", "batch": 16, "seq_kv": 4096, "q_heads": 16, "head_dim_qk": 576, "head_dim_v": 512,
    },
    "gdn": {
        "dtype": "bf16", "variant": "gdn", "phase": "prefill", "stage": "scan", "batch": 2, "seq": 4096,
        "k_heads": 8, "v_heads": 16, "head_k_dim": 128, "head_v_dim": 128, "d_conv": 4,
    },
    "dsa": {
        "dtype": "fp8", "stage": "index_logits", "score_mode": "none", "batch": 4, "seq_q": 512, "prefix": 8192,
        "q_heads": 64, "index_heads": 32, "index_dim": 128, "topk": 2048, "head_dim_qk": 576, "head_dim_v": 512,
    },
    "gemm": {"dtype": "bf16", "m": 512, "n": 4096, "k": 4096},
    "moe": {
        "dtype": "bf16", "tokens": 512, "d_model": 4096, "d_ff": 1024, "experts": 64, "topk": 4, "gated": 1,
        "routing": "balanced",
    },
}  # fmt: skip
STAGES = [
    *({**SHAPES["gdn"], "variant": v, "stage": s, "phase": p} for v in ("gdn", "kda") for s, p in (
        ("scan", "prefill"), ("conv", "prefill"), ("conv", "decode"), ("recurrent", "decode"),
    )),
]  # fmt: skip
CALLS = [
    *SHAPES.items(),
    *(("gdn", shape) for shape in STAGES),
    ("dsa", {**SHAPES["dsa"], "stage": "topk", "dtype": "fp32", "score_mode": "flat"}),
    ("dsa", {**SHAPES["dsa"], "stage": "sparse_attn", "dtype": "bf16"}),
    ("attn_prefill", {**SHAPES["attn_prefill"], "window": 1024}),
    ("moe", {**SHAPES["moe"], "routing": "power_law_1.2", "gated": 0}),
]
# Sizes that cost time when they grow alone. Head widths of attention are left out: 128 and 256 have better kernels.
SIZES = {
    "attn_prefill": ("batch", "seq_q", "q_heads", "kv_heads"),
    "attn_decode": ("batch", "seq_kv", "q_heads", "kv_heads", "head_dim"),
    "attn_encoder": ("batch", "seq_q", "q_heads"),
    "mla_prefill": ("batch", "seq_q", "q_heads"),
    "mla_decode": ("batch", "seq_kv", "q_heads"),
    "gdn": ("batch", "seq", "k_heads", "v_heads"),
    "dsa": ("batch", "seq_q", "prefix"),
    "gemm": ("m", "n", "k"),
    "moe": ("tokens", "d_model", "d_ff", "topk"),
}


def supported(kind: str, shape: dict, name: str) -> bool:
    return not (shape["dtype"] == "fp8" and not figures_of(device_named(name)).fp8)


def number(kind: str, part: str = "h100", **changed: object) -> float:
    return predict(kind, device_named(part), {**SHAPES[kind], **changed}).seconds


@pytest.mark.parametrize(("kind", "shape"), CALLS, ids=lambda x: x if isinstance(x, str) else x.get("stage", ""))
def test_every_part_of_the_table_gets_a_finite_estimate_inside_its_interval(kind: str, shape: dict) -> None:
    for part in (*MEASURED_PARTS, *OTHER_PARTS):
        if supported(kind, shape, part):
            found = predict(kind, device_named(part), shape)
            assert 0 < found.low < found.seconds < found.high < math.inf, part
            assert found.high / found.low < 6, part


def test_every_model_has_coefficients_with_unit_and_meaning() -> None:
    stored = json.loads(files("attnc.cost_models.latency").joinpath("coefficients.json").read_text("utf-8"))["models"]
    assert stored.keys() == MODELS.keys()
    for name, model in MODELS.items():
        assert stored[name]["coefficients"].keys() == {c.name for c in model.coefficients}, name
        assert set(stored[name]["error"]) == {"parts left out", "shapes left out"}
        for interval in stored[name]["interval"].values():
            assert len(interval["low"]) == len(interval["high"]) == len(interval["edges"]) + 1
    for name in MODELS:
        for c in stored[name]["coefficients"].values():
            assert c["unit"] and c["meaning"]


sizes = st.sampled_from([1, 2, 3, 7, 16, 33, 64, 100, 128, 500, 1024, 4096, 10000])


def lawful(kind: str, shape: dict) -> dict:
    """Query heads are a multiple of key heads; as many experts are chosen as there are."""
    if "kv_heads" in shape:
        shape["q_heads"] = max(shape["q_heads"], shape["kv_heads"])
    if kind == "gdn":
        shape["v_heads"] = max(shape["v_heads"], shape["k_heads"])
    if "topk" in shape and "experts" in shape:
        shape["topk"] = min(shape["topk"], shape["experts"])
    return shape


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_time_grows_with_every_size(kind: str, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(("a100", "h100", "b200", "l40s", "rtxpro6000")))
    if kind == "dsa" and part == "a100":
        part = "h200"
    shape = dict(SHAPES[kind])
    for column in SIZES[kind]:
        shape[column] = data.draw(sizes)
    shape = lawful(kind, shape)
    column = data.draw(st.sampled_from(SIZES[kind]))
    larger = lawful(kind, {**shape, column: shape[column] * data.draw(st.sampled_from((2, 3, 8)))})
    device = device_named(part)
    assert predict(kind, device, larger).seconds >= predict(kind, device, shape).seconds * 0.999


# What a serving step varies, by kind: batch and lengths.
LENGTHS = {
    "attn_prefill": ("batch", "seq_q"),
    "attn_decode": ("batch", "seq_kv"),
    "attn_encoder": ("batch", "seq_q"),
    "mla_prefill": ("batch", "seq_q"),
    "mla_decode": ("batch", "seq_kv"),
    "gdn": ("batch", "seq"),
    "dsa": ("batch", "seq_q", "prefix"),
    "gemm": ("m",),
    "moe": ("tokens",),
}
ROUNDING = 1e-9  # the only way in which one more of anything may take less time


@pytest.mark.parametrize(("kind", "shape"), CALLS, ids=lambda x: x if isinstance(x, str) else x.get("stage", ""))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_sequence_or_one_token_more_never_takes_less(kind: str, shape: dict, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(("a100", "h100", "b200", "l40s", "rtxpro6000", "mi300x")))
    assume(supported(kind, shape, part))
    drawn = {column: data.draw(st.integers(1, 9) | st.integers(1, 20_000)) for column in LENGTHS[kind]}
    column = data.draw(st.sampled_from(LENGTHS[kind]))
    fewer = {**shape, **drawn}
    more = {**fewer, column: fewer[column] + data.draw(st.integers(1, 3) | st.integers(1, 300))}
    device = device_named(part)
    assert predict(kind, device, more).seconds >= predict(kind, device, fewer).seconds * (1 - ROUNDING)


@pytest.mark.parametrize("part", ["h100", "h200", "b200"])
def test_index_logits_of_few_queries_take_as_long_as_the_keys_of_one_sequence(part: str) -> None:
    times = [number("dsa", part, batch=16, seq_q=queries) for queries in (1, 2, 3, 4)]
    assert times == sorted(times) and times[-1] < 1.01 * times[0]  # the launch and one walk over 8192 keys


# FLOP and bytes that no kernel avoids, counted by hand from the shape; the cache counts once, in bf16.
WORK = {
    "gemm": lambda s: (2 * s["m"] * s["n"] * s["k"], 2 * (s["m"] * s["k"] + s["n"] * s["k"] + s["m"] * s["n"])),
    "attn_prefill": lambda s: (
        2 * s["batch"] * s["q_heads"] * s["seq_q"] ** 2 * s["head_dim"],
        4 * s["batch"] * s["seq_q"] * s["head_dim"] * (s["q_heads"] + s["kv_heads"]),
    ),
    "attn_decode": lambda s: (
        4 * s["batch"] * s["q_heads"] * s["seq_kv"] * s["head_dim"],
        4 * s["batch"] * s["seq_kv"] * s["kv_heads"] * s["head_dim"],
    ),
    "attn_encoder": lambda s: (
        4 * s["batch"] * s["q_heads"] * s["seq_q"] ** 2 * s["head_dim"],
        8 * s["batch"] * s["seq_q"] * s["q_heads"] * s["head_dim"],
    ),
    "mla_prefill": lambda s: (
        s["batch"] * s["q_heads"] * s["seq_q"] ** 2 * 320,
        4 * s["batch"] * s["seq_q"] * s["q_heads"] * 320,
    ),
    "mla_decode": lambda s: (
        2 * s["batch"] * s["q_heads"] * s["seq_kv"] * 1088,
        s["batch"] * s["seq_kv"] * 576 * 2,
    ),
    "moe": lambda s: (
        6 * s["tokens"] * s["topk"] * s["d_model"] * s["d_ff"],
        6 * min(s["tokens"] * s["topk"], s["experts"]) * s["d_model"] * s["d_ff"],
    ),
}


@pytest.mark.parametrize("kind", WORK)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_prediction_beats_the_roofs(kind: str, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(("a100", "h100", "b200", "l40s", "mi300x", "h20")))
    shape = dict(SHAPES[kind])
    for column in SIZES[kind]:
        shape[column] = data.draw(sizes)
    shape = lawful(kind, shape)
    gpu = gpu_named(part)
    flops, moved = WORK[kind](shape)
    seconds = predict(kind, gpu, shape).seconds
    assert seconds >= 0.98 * flops / gpu.tensor["bf16"]
    assert seconds >= 0.98 * (moved - gpu.l2_bytes - gpu.l3_bytes) / gpu.bandwidth


def test_work_of_attention_is_counted_by_hand() -> None:
    # Causal: half of the square; 2 products of 2 FLOP. 989.4 TFLOP/s is the peak of H100.
    seconds = number("attn_prefill", batch=8, seq_q=16384, q_heads=32, kv_heads=8)
    flops = 4 * 128 * 8 * 32 * 16384**2 / 2
    assert 0.45 < flops / seconds / 989.4e12 < 0.85


@pytest.mark.parametrize(
    ("kind", "part", "changed", "says"),
    [
        ("attn_prefil", "h100", {}, "Did you mean 'attn_prefill'"),
        ("gemm", "h100", {"m": 0}, "m: found 0, allowed are positive numbers"),
        ("gemm", "h100", {"k": None}, "k: found None"),
        ("gemm", "h100", {"k": "4096"}, "k: found '4096'"),
        ("gemm", "h100", {"dtype": "fp7"}, "dtype: found 'fp7', allowed are bf16"),
        ("gemm", "a100", {"dtype": "fp8"}, "fp8 on a100: found no matrix rate"),
        ("gemm", "cpu", {}, "found a cpu, allowed is a GPU"),
        ("gdn", "h100", {"stage": "sacn"}, "in no table"),
        ("moe", "h100", {"routing": "uniform"}, "routing"),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_a_sentence(kind: str, part: str, changed: dict, says: str) -> None:
    shape = {**SHAPES.get(kind, SHAPES["attn_prefill"]), **changed}
    with pytest.raises(UsageError) as refused:
        predict(kind, device_named(part), shape)
    assert says in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_column_is_named(kind: str) -> None:
    shape = {key: value for key, value in SHAPES[kind].items() if key != "batch" and key != "m" and key != "tokens"}
    with pytest.raises(UsageError, match=r"column '(batch|m|tokens)' is missing"):
        predict(kind, device_named("h100"), shape)


def test_a_sheet_of_figures_predicts_as_the_device_of_that_name() -> None:
    sheet = {
        "arch": "sm90", "bf16": 989.4, "fp8": 1978.9, "mem": 4800, "l2": 50, "sms": 132, "clock": 1980, "tdp": 700,
        "smem_kb": 228, "mem_gb": 141,
    }  # fmt: skip
    for kind, shape in SHAPES.items():
        assert predict(kind, figures_of_sheet("h200", sheet), shape) == predict(kind, device_named("h200"), shape)


def test_a_class_without_measurements_inherits_from_its_nearest() -> None:
    value = {"base": 1.0, "sm80": 2.0, "sm90": 3.0, "sm120": 4.0}
    assert [of_class(value, arch) for arch in ("sm80", "sm89", "sm100", "sm103", "gfx942")] == [2.0, 4.0, 3.0, 3.0, 1.0]
    assert of_class(5.0, "sm90") == 5.0


# (kind, part, changed columns, microseconds predicted when the coefficients were last fitted)
SPOTS: tuple[tuple[str, str, dict, float], ...] = (
    ("attn_prefill", "h100", {}, 173.1),
    ("attn_prefill", "h100", {"dtype": "fp8", "window": 128, "head_dim": 64}, 59.22),
    ("attn_prefill", "l40s", {"seq_q": 8192}, 5686),
    ("attn_decode", "b200", {}, 18.29),
    ("attn_decode", "h100", {"dtype": "bf16_kvfp8"}, 17.34),
    ("attn_encoder", "rtxpro6000", {}, 90.98),
    ("mla_prefill", "a100", {}, 354.9),
    ("mla_decode", "h200", {}, 35.45),
    ("mla_decode", "l40s", {"q_heads": 128}, 261.2),
    ("gdn", "h100", {}, 204.9),
    ("gdn", "l40s", {}, 858.2),
    ("gdn", "h100", {"stage": "conv"}, 59.09),
    ("dsa", "h100", {}, 160.8),
    ("gemm", "b200", {"m": 8192}, 174.3),
    ("gemm", "a100", {"m": 1}, 25.29),
    ("moe", "h100", {}, 614.9),
    ("moe", "rtxpro6000", {"dtype": "fp8_block", "routing": "power_law_1.2"}, 539.6),
)


@pytest.mark.parametrize(("kind", "part", "changed", "us"), SPOTS)
def test_spot_values_stay(kind: str, part: str, changed: dict, us: float) -> None:
    assert number(kind, part, **changed) * 1e6 == pytest.approx(us, rel=0.02)


def test_more_memory_bandwidth_helps_a_long_decode_and_not_a_large_product() -> None:
    decode, product = {"batch": 64, "seq_kv": 16384}, {"m": 8192, "n": 8192, "k": 8192}
    assert number("attn_decode", "h100", **decode) / number("attn_decode", "h200", **decode) > 1.25
    assert number("gemm", "h100", **product) / number("gemm", "h200", **product) < 1.05


def test_sixteen_experts_of_one_tile_each_cost_their_weights() -> None:
    seconds = number("moe", tokens=16, experts=16, topk=1, d_ff=4096)
    weights = 16 * 3 * 4096 * 4096 * 2
    assert seconds > weights / 3.35e12
