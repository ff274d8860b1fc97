"""Keys, values and queries that lie in 8 bits: the widening is absorbed, scales move to the query and the output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.options import Options
from attnc.passes.apply import apply_choices
from attnc.passes.pipeline import Analysis, analyse
from attnc.region import AttentionRegion
from tests.codegen.interpreter import mend
from tests.tolerance import assert_close, error

mend()
E4, E5, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
HEADS, KEYS, WIDTH = 4, 2, 16


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KEYS, 1) for x in (k, v))
    return (q @ k.mT * 0.25).softmax(-1) @ v


def plain_cast(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return sdpa(q, k.to(BF16), v.to(BF16))


def uncast(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return sdpa(q, k, v)


def number(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return sdpa(q, k.to(BF16) * 0.3, v.to(BF16) / 3.0)


def scale_of_tensors(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return by_hand(q, k.to(BF16) * c[0, 0, 0, 0], d[0, 0, 0, 0] * v.to(BF16))


def scale_of_heads(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return sdpa(q, (k.float() * c).to(BF16), (v.float() / d).to(BF16))


def scale_before_views(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    k, v = ((x.to(BF16) * y.transpose(1, 2).to(BF16)).transpose(1, 2) for x, y in ((k, c), (v, d)))
    return by_hand(q, k, v)


def softcapped(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    k, v = ((x.to(BF16) * y.to(BF16)).repeat_interleave(HEADS // KEYS, 1) for x, y in ((k, c), (v, d)))
    return ((q @ k.mT * 0.02).tanh() * 20.0).softmax(-1) @ v


def key_alone(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return sdpa(q, k.to(BF16), v[..., :WIDTH].float().exp().to(BF16))


def all_three(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    q = q.to(E4).to(BF16) * c.repeat_interleave(2, 1).to(BF16)
    return sdpa(q, k.to(BF16) * c.to(BF16), v.to(BF16) * d.to(BF16))


ABSORBED = {
    plain_cast: ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    number: ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    scale_of_tensors: ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    scale_of_heads: ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    scale_before_views: ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    softcapped: ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    key_alone: ("bfloat16", "float8_e4m3fn", "bfloat16"),
    all_three: ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2"),
}


def scale_of_tokens(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    tokens = torch.arange(k.shape[2])[:, None].to(BF16)
    return sdpa(q, k.to(BF16) * tokens, v.to(BF16) * tokens)


def scale_of_channels(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    channels = torch.arange(WIDTH).to(BF16)
    return sdpa(q, k.to(BF16) * channels, v.to(BF16) * channels)


def shifted(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return sdpa(q, k.to(BF16) + 1.0, v.to(BF16) + d.to(BF16))


def written_between(q: Tensor, k: Tensor, v: Tensor, c: Tensor, d: Tensor) -> Tensor:
    k, v = k.to(BF16), v.to(BF16)
    k[:, :, 0] = 1.0
    v[:, :, 0] = 1.0
    return sdpa(q, k, v)


APART = (scale_of_tokens, scale_of_channels, shifted, written_between)


def inputs(rows: int = 1, keys: int = 70) -> tuple[Tensor, ...]:
    query = torch.randn(2, HEADS, rows, WIDTH, dtype=BF16)
    key, value = (torch.randn(2, KEYS, keys, WIDTH).to(kind) for kind in (E4, E5))
    return query, key, value, torch.rand(1, KEYS, 1, 1) + 0.5, torch.rand(1, KEYS, 1, 1) + 0.5


def run(written: Callable[..., Tensor], args: tuple[Tensor, ...], **options) -> tuple[Tensor, Analysis]:
    """What the compiled function gives, and what was found in it."""
    torch._dynamo.reset()
    kept: list[Analysis] = []

    def backend(gm, example_inputs):
        given = Options(**options)
        kept.append(analyse(gm, example_inputs, given))
        return apply_choices(kept[0], gm, given) or gm

    with torch.no_grad():
        return torch.compile(written, backend=backend)(*args), kept[0]


def region_of(analysis: Analysis) -> AttentionRegion:
    (region,) = analysis.regions
    assert isinstance(region, AttentionRegion)
    return region


@pytest.mark.parametrize("form", ["flash_decode", "flash"])
@pytest.mark.parametrize("written", ABSORBED)
def test_operands_of_8_bits_are_read_as_they_lie(written, form, tmp_path, poisoned_memory) -> None:
    args = inputs()
    out, analysis = run(written, args, device="h100", force=form, store=str(tmp_path))
    region = region_of(analysis)
    assert region.stored == ABSORBED[written] and region.dtype == "bfloat16"
    assert region.choice is not None and region.choice.name == form and not analysis.problems
    assert out.dtype == BF16
    assert_close(out, written(*args), BF16)


@pytest.mark.parametrize("written", APART)
def test_what_is_no_scale_of_heads_stays_as_written(written, tmp_path) -> None:
    args = inputs()
    out, analysis = run(written, args, device="h100", force="flash_decode", store=str(tmp_path))
    assert region_of(analysis).stored == () and not analysis.problems
    assert_close(out, written(*args), BF16)


def test_moving_a_scale_adds_no_error_to_the_kernel(tmp_path) -> None:
    query, key, value, c, d = args = inputs(rows=3)
    moved, _ = run(scale_of_heads, args, device="h100", force="flash", store=str(tmp_path))
    scaled = query, (key.float() * c).to(BF16), (value.float() / d).to(BF16)
    kept, _ = run(sdpa, scaled, device="h100", force="flash", store=str(tmp_path))
    want = sdpa(query.double(), key.double() * c.double(), value.double() / d.double())
    assert error(moved, want) <= 1.2 * error(kept, want)


def test_forms_that_take_no_8_bits_widen_them(tmp_path) -> None:
    args = inputs(rows=33)
    out, analysis = run(scale_of_heads, args, force="dense", store=str(tmp_path))
    region = region_of(analysis)
    assert region.stored == ABSORBED[scale_of_heads] and region.choice is not None and region.choice.form == "dense"
    assert_close(out, scale_of_heads(*args), BF16)


def test_a_query_of_another_type_than_bfloat16_is_widened_as_written(tmp_path) -> None:
    def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q.half(), k.half(), v.half())

    args = inputs()
    given = (args[0].to(E4), *args[1:3])
    out, analysis = run(half, given, device="h100", force="flash", store=str(tmp_path))
    region = region_of(analysis)
    assert region.stored == ("float16", "float8_e4m3fn", "float8_e5m2")
    assert region.dtype == "float16" and out.dtype == torch.float16
    assert_close(out, half(*given), torch.float16)


def test_a_region_that_trains_is_left_to_its_widened_operands() -> None:
    kept: list[Analysis] = []

    def backend(gm, example_inputs):
        kept.append(analyse(gm, example_inputs, Options(device="h100")))
        return gm

    query, *rest = inputs()
    torch._dynamo.reset()
    torch.compile(plain_cast, backend=backend)(query.requires_grad_(), *rest)
    assert region_of(kept[0]).stored == ()


def found(name: str, written: Callable[..., Tensor], *kinds: torch.dtype, store: str) -> AttentionRegion:
    """The region of one decoded token over long caches of `kinds`, chosen for a GPU."""
    torch._dynamo.reset()
    kept: list[Analysis] = []

    def backend(gm, example_inputs):
        kept.append(analyse(gm, example_inputs, Options(device=name, store=store)))
        return gm

    key, value = (torch.zeros(2, KEYS, 4096, 128, dtype=kind) for kind in kinds)
    scale = torch.ones(1, KEYS, 1, 1)
    query = torch.zeros(2, HEADS, 1, 128, dtype=BF16)
    with torch.no_grad():
        torch.compile(written, backend=backend, dynamic=False)(query, key, value, scale, scale)
    return region_of(kept[0])


def test_a_cache_of_8_bits_is_chosen_by_cost_and_has_a_key_of_its_own(tmp_path) -> None:
    store = str(tmp_path)
    narrow, plain = found("h100", plain_cast, E4, E4, store=store), found("h100", uncast, BF16, BF16, store=store)
    assert narrow.key != plain.key and narrow.bytes < 0.6 * plain.bytes
    assert narrow.choice is not None and narrow.choice.name == "flash_decode"
    refused = found("mi300x", plain_cast, E4, E4, store=store).choice
    assert refused is not None and "found operands of float8_e4m3fn on hip:gfx942" in refused.refused["flash_decode"]
