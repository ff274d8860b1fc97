"""Latent attention by phase: absorbed over a cache of latents where that pays, never otherwise, always equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.passes.attention import absorb
from attnc.passes.attention.latent import LatentShape, absorbed_work, expanded_work, seconds_of
from tests.gallery_run import assert_same, attention, attnc_compiled, run
from tests.tolerance import assert_close

V3 = LatentShape(B=1, H=128, L=1, S=4096, nope=128, rope=64, rank=512, width=128)
H100 = (990e12, 3.35e12 / 2)  # FLOP/s of bf16 products, elements/s
HEADS, NOPE, ROPE, RANK, WIDTH = 4, 16, 8, 12, 10


def resized(**sizes: int) -> LatentShape:
    return LatentShape(**{**V3.__dict__, **sizes})


def pays(s: LatentShape) -> bool:
    """Whether the absorbed order is the faster one."""
    absorbed, expanded = seconds_of(s, *H100)
    return absorbed < expanded


def test_decode_of_deepseek_v3_is_absorbed_and_its_prefill_is_not() -> None:
    assert pays(V3) and pays(resized(B=64)) and pays(resized(L=2))
    assert not pays(resized(L=4096))


def test_work_of_both_orders_by_hand() -> None:
    s = LatentShape(B=1, H=2, L=3, S=5, nope=4, rope=1, rank=6, width=7)
    assert expanded_work(s)[0] == 2 * 5 * 6 * 2 * 11 + 2 * 2 * 3 * 5 * 12
    assert absorbed_work(s)[0] == 2 * 3 * 6 * 2 * 11 + 2 * 2 * 3 * 5 * 13
    assert expanded_work(s)[1] == 5 * 7 + 2 * 5 * 2 * 12 + 2 * 11 * 6
    assert absorbed_work(s)[1] == 5 * 7 + 2 * 2 * 3 * 13 + 2 * 11 * 6


def test_more_rows_never_turn_the_choice_to_absorbed() -> None:
    chosen = [pays(resized(L=rows)) for rows in (1, 4, 16, 64, 256, 1024, 4096)]
    assert chosen == sorted(chosen, reverse=True)


class Step(nn.Module):
    """One decode step over cached latents and rotary keys, keys and values expanded per head."""

    def __init__(self, spelling: str = "composed", bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(RANK, HEADS * (NOPE + WIDTH), bias=bias)
        self.q = nn.Linear(20, HEADS * (NOPE + ROPE), bias=False)
        self.spelling = spelling

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.expanded(latent)
        k = self.joined(k, rope[:, None].expand(-1, HEADS, -1, -1))
        L, S = q.shape[2], k.shape[2]
        if self.spelling == "sdpa":
            keep = torch.arange(S) <= torch.arange(L)[:, None] + S - L
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)
        mask = torch.full((L, S), -torch.inf).triu(S - L + 1)
        out = (q @ k.mT * 24**-0.5 + mask).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    def expanded(self, latent: Tensor) -> tuple[Tensor, ...]:
        return self.up(latent).unflatten(-1, (HEADS, -1)).transpose(1, 2).split([NOPE, WIDTH], -1)

    def joined(self, k: Tensor, rope: Tensor) -> Tensor:
        return torch.cat([k, rope], -1)


class Copied(Step):
    """Keys are written into fresh memory, as transformers does."""

    def joined(self, k: Tensor, rope: Tensor) -> Tensor:
        keys = k.new_empty(*k.shape[:-1], NOPE + ROPE)
        keys[..., :NOPE].copy_(k)
        keys[..., NOPE:].copy_(rope)
        return keys


class Apart(Step):
    """Two up-projections, the shared channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.up_k, self.up_v = (nn.Linear(RANK, HEADS * width, bias=False) for width in (NOPE, WIDTH))
        self.up = None

    def expanded(self, latent: Tensor) -> tuple[Tensor, ...]:
        return tuple(up(latent).unflatten(-1, (HEADS, -1)).transpose(1, 2) for up in (self.up_k, self.up_v))

    def joined(self, k: Tensor, rope: Tensor) -> Tensor:
        return torch.cat([rope, k], -1)


class Stacked(Step):
    """One weight that holds all keys' rows before all values' rows."""

    def expanded(self, latent: Tensor) -> tuple[Tensor, ...]:
        parts = self.up(latent).split([HEADS * NOPE, HEADS * WIDTH], -1)
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)


class Bent(Step):
    """A nonlinearity stands between the latent and the values."""

    def expanded(self, latent: Tensor) -> tuple[Tensor, ...]:
        k, v = super().expanded(latent)
        return k, torch.tanh(v)


class Normed(Step):
    """The expanded keys are normed per head."""

    def expanded(self, latent: Tensor) -> tuple[Tensor, ...]:
        k, v = super().expanded(latent)
        return F.normalize(k, dim=-1), v


class ScaledHeads(Step):
    """Each head's keys have a scale of their own."""

    def expanded(self, latent: Tensor) -> tuple[Tensor, ...]:
        k, v = super().expanded(latent)
        return k * torch.arange(1.0, HEADS + 1)[:, None, None], v


class OtherLatent(Step):
    """Keys and values come from different latents."""

    def expanded(self, latent: Tensor) -> tuple[Tensor, ...]:
        return super().expanded(latent)[0], super().expanded(latent.flip(1))[1]


class OwnRope(Step):
    """Each head turns its own rotary key."""

    def joined(self, k: Tensor, rope: Tensor) -> Tensor:
        return torch.cat([k, rope * torch.arange(1.0, HEADS + 1)[:, None, None]], -1)


class Shuffled(Step):
    """The cached latents are dealt out in another order after keys are made."""

    def joined(self, k: Tensor, rope: Tensor) -> Tensor:
        return torch.cat([k.roll(1, 1), rope], -1)


class Written(Step):
    """The keys are changed in place after they are joined."""

    def joined(self, k: Tensor, rope: Tensor) -> Tensor:
        keys = torch.cat([k, rope], -1)
        keys[:, :, 0] += 1.0
        return keys


def step_inputs(rows: int = 1, keys: int = 70) -> tuple[Tensor, ...]:
    return torch.randn(2, rows, 20), torch.randn(2, keys, RANK), torch.randn(2, keys, ROPE)


def compared(model: nn.Module, args: tuple[Tensor, ...], backward: bool = False, inner: str = "eager"):
    """The report of a model that attnc computes as eager does."""
    want = run(model, args, backward)
    model.zero_grad()
    compiled = attnc_compiled(model, inner=inner)
    assert_same(run(compiled, args, backward, named=model), want)
    return attnc.last_report(compiled)


ABSORBED = {
    "composed": Step,
    "sdpa": lambda: Step("sdpa"),
    "copied": Copied,
    "copied_sdpa": lambda: Copied("sdpa"),
    "apart": Apart,
    "stacked": Stacked,
}
KEPT = {
    "bent": Bent,
    "scaled_heads": ScaledHeads,
    "normed": Normed,
    "other_latent": OtherLatent,
    "own_rope": OwnRope,
    "shuffled": Shuffled,
    "written": Written,
}


def steps():
    """Each spelling with one row trained or three run, and the other way round; the rest is slow."""
    for at, name in enumerate(ABSORBED):
        for rows, backward in ((1, False), (1, True), (3, False), (3, True)):
            marks = () if (rows == 3) == ((at % 2 == 0) == backward) else pytest.mark.slow
            yield pytest.param(name, rows, backward, marks=marks)


@pytest.mark.parametrize(("name", "rows", "backward"), list(steps()))
def test_step_over_cached_latents_is_absorbed(name: str, rows: int, backward: bool) -> None:
    report = compared(ABSORBED[name](), step_inputs(rows), backward, "aot_eager" if name == "composed" else "eager")
    (region,) = attention(report)
    assert (region.shape.H, region.shape.E, region.shape.Ev) == (1, RANK + ROPE, RANK)
    assert region.rule.scale == pytest.approx(24**-0.5)
    assert any("latents of 12 channels" in note for note in report.notes)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_plain_latent_stays_expanded(name: str) -> None:
    report = compared(KEPT[name](), step_inputs(), backward=True)
    assert all(region.shape.H == HEADS for region in attention(report)) and not report.notes


def test_a_bias_of_the_up_projection_is_refused_in_a_sentence() -> None:
    report = compared(Step(bias=True), step_inputs(), backward=True)
    (note,) = report.notes
    assert [region.shape.H for region in attention(report)] == [HEADS] and not report.problems
    assert "no bias, and this one has: left as written." in note


def test_a_wrong_absorption_is_caught_and_left_as_written(monkeypatch, tmp_path) -> None:
    per_head = absorb._per_head

    def wrong(emit, expansion, heads):
        return per_head(emit, replace(expansion, offset=0), heads)

    monkeypatch.setattr(absorb, "_per_head", wrong)
    model, args = Step(), step_inputs()
    compiled = attnc_compiled(model, store=str(tmp_path))
    assert_same(run(compiled, args, named=model), run(model, args))
    report = attnc.last_report(compiled)
    (problem,) = report.problems
    assert [region.shape.H for region in attention(report)] == [HEADS] and not report.notes
    assert "left as written" in problem


def test_prefill_stays_expanded() -> None:
    report = compared(Step(), step_inputs(70))
    assert [region.shape.H for region in attention(report)] == [HEADS] and not report.notes


def test_weights_updated_after_compile_are_used() -> None:
    model, args = Step(), step_inputs()
    compiled = attnc_compiled(model, inner="eager")
    with torch.no_grad():
        compiled(*args)
        model.up.weight.mul_(1.5)
        assert_close(compiled(*args), model(*args))


def test_returned_weights_keep_the_written_order() -> None:
    class Returned(Step):
        def forward(self, x, latent, rope):
            q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            k, v = self.expanded(latent)
            weights = (q @ self.joined(k, rope[:, None].expand(-1, HEADS, -1, -1)).mT).softmax(-1)
            return weights @ v, weights

    assert not compared(Returned(), step_inputs()).notes


def decoders():
    """Of family, spelling and length every pair; the rest is slow."""
    for first, family in enumerate(("DeepseekV2", "DeepseekV3")):
        for second, implementation in enumerate(("eager", "sdpa")):
            for third, length in enumerate((33, 70)):
                marks = () if (first + second + third) % 2 == 0 else pytest.mark.slow
                yield pytest.param(family, implementation, length, marks=marks)


@pytest.mark.parametrize(("family", "implementation", "length"), list(decoders()))
def test_transformers_decodes_over_its_cached_latents(family: str, implementation: str, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        v_head_dim=12,
        qk_nope_head_dim=16,
        first_k_dense_replace=2,
        attn_implementation=implementation,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(0, 64, (2, length + 1))
    logits, report = {}, None
    for name in ("eager", "attnc"):
        torch._dynamo.reset()
        cache = transformers.DynamicCache(config=config)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
            step = attnc_compiled(model, inner="eager") if name == "attnc" else model
            logits[name] = step(ids[:, -1:], past_key_values=cache).logits
        report = attnc.last_report(step) if name == "attnc" else report
    off = (logits["attnc"] - logits["eager"]).abs().max() / logits["eager"].abs().max()
    assert off < 1e-4
    assert [region.shape.H for region in attention(report)] == [1, 1] and len(report.notes) == 2


def test_transformers_trains_as_written() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        v_head_dim=12,
        qk_nope_head_dim=16,
        first_k_dense_replace=1,
        attn_implementation="sdpa",
    )
    layer = transformers.DeepseekV3ForCausalLM(config).model
    ids = torch.randint(0, 64, (2, 33))
    grads = []
    for model in (layer, attnc_compiled(layer)):
        layer.zero_grad()
        model(ids, use_cache=False).last_hidden_state.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
    assert not attnc.last_report(model).notes
    for name, want in grads[0].items():
        assert (grads[1][name] - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1e-3), name
