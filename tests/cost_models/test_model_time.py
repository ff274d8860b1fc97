"""Steps as calls: their FLOP are the card's, their bytes hold weights and caches, their times add up."""

from __future__ import annotations

import pytest

from attnc.cost_models.device import device_named
from attnc.cost_models.layers import Conventions
from attnc.cost_models.model_card import model_card
from attnc.cost_models.model_time import USABLE, Setting, memory, plain, step_calls, step_time
from attnc.errors import UsageError
from tests.cost_models.headlines import CONFIGS

SPARSE = {
    **CONFIGS["DeepSeek-V3"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
H100 = device_named("h100")


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("name", [*sorted(CONFIGS), "sparse"])
def test_calls_have_the_flops_of_the_card(name: str, phase: str) -> None:
    card = model_card(SPARSE if name == "sparse" else CONFIGS[name])
    at = Setting(3, 16_384, phase)
    passes = 3 if phase == "train" else 1
    counted = sum(call.flops * call.count for call in step_calls(card, at)) * passes
    assert counted == pytest.approx(3 * card.flops(phase, 16_384).total, rel=0.002)


@pytest.mark.parametrize("name", ["LLaMA-3.1-8B", "DeepSeek-V3", "Kimi Linear", "Nemotron 3 Nano", "gpt-oss-20b"])
def test_a_decode_step_moves_the_weights_it_touches_and_the_caches(name: str) -> None:
    card, batch, context = model_card(CONFIGS[name]), 16, 32_768
    moved = sum(call.bytes * call.count for call in step_calls(card, Setting(batch, context)))
    least = 2 * card.touched_weights(batch) + batch * card.decode_traffic(context)
    assert least * 0.99 < moved < 1.1 * least


@pytest.mark.parametrize("device", ["h100", "l40s", "mi300x", "cpu"])
def test_rows_add_up_to_the_total(device: str) -> None:
    rows = step_time(model_card(CONFIGS["Kimi Linear"]), device_named(device), Setting(2, 4096, "prefill"))
    total = rows.pop("total")
    for column in ("seconds", "low", "high"):
        assert sum(getattr(row, column) for row in rows.values()) == pytest.approx(getattr(total, column))
    assert set(rows) >= {"attention", "recurrence", "experts", "projections", "output head", "norms"}


def test_no_call_is_faster_than_its_plain_roof_by_more_than_caches_allow() -> None:
    """At sizes beyond any cache, a prediction lies above the time at peak rates."""
    at = Setting(8, 32_768, "prefill")
    for name in ("LLaMA-3.1-8B", "Mixtral 8x7B", "DeepSeek-V3"):
        card = model_card(CONFIGS[name])
        flops = 8 * card.flops("prefill", 32_768).total
        assert step_time(card, H100, at)["total"].seconds > flops / 989.4e12


def test_an_indexer_makes_long_contexts_cheaper_and_short_ones_no_dearer() -> None:
    dense, sparse = model_card(CONFIGS["DeepSeek-V3"]), model_card(SPARSE)

    def attention(card: object, context: int) -> float:
        return step_time(card, H100, Setting(8, context, "prefill"))["attention"].seconds  # type: ignore[arg-type]

    assert attention(sparse, 2048) == attention(dense, 2048)
    assert attention(sparse, 131_072) < 0.7 * attention(dense, 131_072)


def test_absorbed_attention_over_a_prompt_costs_more_than_naive() -> None:
    card = model_card(CONFIGS["DeepSeek-V3"])
    naive, absorbed = (
        step_time(card, H100, Setting(1, 16_384, "prefill", how=Conventions(mla=m)))["attention"].seconds
        for m in ("naive", "absorbed")
    )
    assert absorbed > 2 * naive


def test_memory_counts_weights_caches_and_in_training_the_optimizer() -> None:
    card = model_card(CONFIGS["LLaMA-3.1-8B"])
    total = card.parameters().total
    decode = memory(card, H100, Setting(4, 8192))
    assert decode.needed == 2 * total + 4 * 131_072 * 8192
    assert decode.usable == USABLE * 80e9
    assert decode.fits and decode.largest_batch == int((USABLE * 80e9 - 2 * total) // (131_072 * 8192))
    train = memory(card, H100, Setting(1, 8192, "train"))
    assert train.weights == 16 * total
    assert not train.fits and train.largest_batch is None
    assert memory(card, device_named("cpu"), Setting(1, 8192, dtype="fp32")).fits is None


def test_a_type_the_device_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="fp8 on a100"):
        step_time(model_card(CONFIGS["LLaMA-3.1-8B"]), device_named("a100"), Setting(1, 64, dtype="fp8"))


def test_a_plain_call_takes_the_slower_of_products_and_traffic_and_a_launch() -> None:
    norms = [
        c for c in step_calls(model_card(CONFIGS["LLaMA-3.1-8B"]), Setting(1, 4096, "prefill")) if c.row == "norms"
    ]
    assert plain(norms[0], H100).seconds == pytest.approx(2 * 4096 * 4096 * 2 / (0.8 * H100.bandwidth) + 3e-6)
