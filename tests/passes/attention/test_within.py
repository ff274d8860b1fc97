"""Values that are the key's first channels: proven from the graph, then read once by the decode kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.codegen import gpu_decode
from attnc.cost_models.device import gpu_named
from attnc.forms.flash_decode import FlashDecode, decode_default
from attnc.options import Options
from attnc.passes.apply import apply_choices
from attnc.passes.pipeline import Analysis, analyse
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.tolerance import assert_close

RANK, ROPE, HEADS = 32, 8, 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.2).softmax(-1) @ v


def cat_of_both(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    return attend(q, torch.cat([c, r], -1)[:, None], c[:, None])


def slice_of_the_cache(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    cache = torch.cat([c, r], -1)
    return attend(q, cache[:, None], cache[:, None, :, :RANK])


def sum_with_rope_first(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    scores = q[..., RANK:] @ r[:, None].mT + q[..., :RANK] @ c[:, None].mT
    return (scores * 0.2).softmax(-1) @ c[:, None]


def sdpa_with_expanded_heads(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    k, v = (x[:, None].expand(-1, HEADS, -1, -1) for x in (torch.cat([c, r], -1), c))
    return F.scaled_dot_product_attention(q, k, v, scale=0.2)


def einsum_with_heads_last(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    rows = q.transpose(1, 2)
    scores = torch.einsum("bshc,btc->bhst", rows[..., :RANK], c) + torch.einsum("bshr,btr->bhst", rows[..., RANK:], r)
    return torch.einsum("bhst,btc->bhsc", (scores * 0.2).softmax(-1), c)


def grown_cache(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    c, r = (torch.cat([x, x[:, :1] * 0.5], 1) for x in (c, r))
    return attend(q, torch.cat([c, r], -1)[:, None], c[:, None])


def later_channels(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    cache = torch.cat([c, r], -1)
    return attend(q, cache[:, None], cache[:, None, :, ROPE:])


def rope_first(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    return attend(q, torch.cat([r, c], -1)[:, None], c[:, None])


def other_latent(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    return attend(q, torch.cat([c, r], -1)[:, None], c.flip(1)[:, None])


def normed_value(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    return attend(q, torch.cat([c, r], -1)[:, None], F.normalize(c, dim=-1)[:, None])


def scaled_value(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    return attend(q, torch.cat([c, r], -1)[:, None], (c * 0.5)[:, None])


def written_between(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    c = c.clone()
    k = torch.cat([c, r], -1)
    c[:, 0] += 1.0
    return attend(q, k[:, None], c[:, None])


SHARED = (
    cat_of_both, slice_of_the_cache, sum_with_rope_first, sdpa_with_expanded_heads, einsum_with_heads_last, grown_cache,
)  # fmt: skip
APART = (later_channels, rope_first, other_latent, normed_value, scaled_value, written_between)


def inputs(rows: int = 1) -> tuple[Tensor, ...]:
    return torch.randn(2, HEADS, rows, RANK + ROPE), torch.randn(2, 70, RANK), torch.randn(2, 70, ROPE)


def decoded(written: Callable[..., Tensor], args: tuple[Tensor, ...], store: str) -> tuple[Tensor, Analysis]:
    """What `written` gives with the decode kernel of an H100, run by Triton's interpreter; and its analysis."""
    kept: list[Analysis] = []

    def backend(gm, example_inputs):
        options = Options(device="h100", force="flash_decode", store=store)
        kept.append(analyse(gm, example_inputs, options))
        return apply_choices(kept[0], gm, options) or gm

    with torch.no_grad():
        return torch.compile(written, backend=backend)(*args), kept[0]


@pytest.fixture
def shared_tiles(monkeypatch) -> list[bool]:
    """For each launch of the decode kernel, whether the value is taken from the key's tile."""
    seen: list[bool] = []
    decode = gpu_decode.decode

    def noted(*args, value_in_key: bool = False, **kwargs):
        seen.append(value_in_key)
        return decode(*args, value_in_key=value_in_key, **kwargs)

    monkeypatch.setattr(gpu_decode, "decode", noted)
    return seen


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("written", SHARED)
def test_a_value_inside_the_key_is_read_from_its_tile(written, rows, shared_tiles, tmp_path, poisoned_memory) -> None:
    args = inputs(rows)
    out, analysis = decoded(written, args, str(tmp_path))
    (region,) = analysis.regions
    assert region.value_in_key and "value=in_key" in region.choice.form and not analysis.problems
    assert shared_tiles and all(shared_tiles)
    assert_close(out, written(*args))


@pytest.mark.parametrize("written", APART)
def test_a_value_that_is_not_proven_to_be_the_keys_is_read_by_itself(written, shared_tiles, tmp_path) -> None:
    args = inputs()
    out, analysis = decoded(written, args, str(tmp_path))
    (region,) = analysis.regions
    assert not region.value_in_key and "value" not in region.choice.form and not analysis.problems
    assert shared_tiles and not any(shared_tiles)
    assert_close(out, written(*args))


def test_regions_alike_but_for_the_value_have_keys_of_their_own() -> None:
    plain = latent_region(value_in_key=False)
    assert plain.key != latent_region().key and plain.facts["value_in_key"] is False


def test_a_region_that_trains_is_never_said_to_share() -> None:
    q, c, r = (x.requires_grad_() for x in inputs())
    kept: list[Analysis] = []

    def backend(gm, example_inputs):
        kept.append(analyse(gm, example_inputs, Options(device="h100")))
        return gm

    torch.compile(cat_of_both, backend=backend)(q, c, r)
    assert not kept[0].regions[0].value_in_key


def latent_region(value_in_key: bool = True, E: int = 576, Ev: int = 512) -> AttentionRegion:
    shape = AttentionShape(8, 128, 1, 1, 8192, E, Ev)
    facts = {"dtype": "bfloat16", "device": "cuda", "value_in_key": value_in_key}
    return AttentionRegion("layer", "softmax", AttentionRule.parse("score=0.125 * s"), shape, **facts)


def test_the_default_reads_the_latent_once_and_is_predicted_faster() -> None:
    gpu, region = gpu_named("h100"), latent_region()
    once, twice = decode_default(region, gpu), decode_default(replace(region, value_in_key=False), gpu)
    assert once is not None and twice is not None and once.value == "in_key" and twice.value == "apart"
    assert once.seconds(region, gpu) < 0.8 * twice.seconds(region, gpu)
    assert all(form.value == "in_key" for form in once.settings(region, gpu))


@pytest.mark.parametrize(
    ("region", "says"),
    [(latent_region(value_in_key=False), "does not prove"), (latent_region(Ev=100), "leading power of two")],
)
def test_a_value_in_the_key_is_refused_in_a_sentence(region: AttentionRegion, says: str) -> None:
    assert says in (FlashDecode(value="in_key").refuse(region) or "") and FlashDecode().refuse(region) is None
