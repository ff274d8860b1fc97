"""Family A as it is written, compiled by attnc, against third-party golden vectors: outputs and gradients.

Each layer is the formula of shared/golden/README.md in plain torch; its attention must be rewritten, and the results
lie within that document's bounds in float64 and float32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from tests.gallery_entry import NEG, ids
from tests.gallery_run import attention
from tests.prologues import delta_values

# The vectors are the check; its own draws 0 or 1 as a number of valid keys, whose gradients are all rounding.
OPTIONS = {"inner": "eager", "force": "dense", "check": False}
BOUNDS = {torch.float64: (2e-7, 2e-7), torch.float32: (5e-6, 5e-5)}  # outputs, gradients


def grouped(x: Tensor, q: Tensor) -> Tensor:
    """transformers' repeat_kv; also of (B, H, N)."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def masked(scores: Tensor, window: int | None = None, causal: bool = True, fill: float = NEG) -> Tensor:
    i, j = ids(scores.shape[-1])
    drop = torch.zeros_like(i - j, dtype=torch.bool) if not causal else j > i
    return scores.masked_fill(drop if window is None else drop | (i - j >= window), fill)


def softmax_attention(t, o):
    q, k, v = t["q"], grouped(t["k"], t["q"]), grouped(t["v"], t["q"])
    scores = masked(q @ k.mT * o["scale"], o["window"], o["causal"])
    if "kv_valid" in t:
        scores = scores.masked_fill(torch.arange(k.shape[2]) >= t["kv_valid"][:, None, None, None], NEG)
    return scores.softmax(-1) @ v


def softmax_softcap(t, o):
    q, k, v = t["q"], grouped(t["k"], t["q"]), grouped(t["v"], t["q"])
    scores = torch.tanh(q @ k.mT * o["scale"] / o["softcap"]) * o["softcap"]
    return masked(scores, o["window"]).softmax(-1) @ v


def softmax_sinks(t, o):
    q, k, v = t["q"], grouped(t["k"], t["q"]), grouped(t["v"], t["q"])
    scores = masked(q @ k.mT * o["scale"], o["window"])
    column = t["sinks"].reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([scores, column], -1)
    logits = logits - logits.max(-1, keepdim=True).values
    return logits.softmax(-1)[..., :-1] @ v


def softmax_sinks_by_sum(t, o):
    q, k, v = t["q"], grouped(t["k"], t["q"]), grouped(t["v"], t["q"])
    scores = masked(q @ k.mT * o["scale"], o["window"])
    return scores.softmax(-1) @ v * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - t["sinks"][:, None, None])


def softmax_alibi(t, o):
    """MPT: slopes of the heads times the position of the key, as build_mpt_alibi_tensor lays them out."""
    q, k, v = (t[n] for n in "qkv")
    heads = 2 ** (q.shape[1] - 1).bit_length()
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=q.dtype) / heads)
    slopes = slopes if heads == q.shape[1] else torch.cat([slopes[1::2], slopes[::2]])[: q.shape[1]]
    bias = slopes[:, None, None] * torch.arange(1 - k.shape[2], 1)
    return masked(q @ k.mT * o["scale"] + bias).softmax(-1) @ v


def softmax_t5_bias(t, o):
    q, k, v = (t[n] for n in "qkv")
    bias = F.embedding(t["bucket"], t["rel_bias"]).permute(2, 0, 1)[None]
    scores = q @ k.mT
    scores += bias
    return masked(scores, causal=o["causal"]).softmax(-1) @ v


def forgetting_attention(t, o):
    q, k, v = t["q"], grouped(t["k"], t["q"]), grouped(t["v"], t["q"])
    total = t["g"].cumsum(-1)
    return masked(q @ k.mT * o["scale"] + total[..., :, None] - total[..., None, :],
                  fill=-torch.inf).softmax(-1) @ v


def path_attention(t, o):
    q, k, v, w, beta = t["q"], *(grouped(t[n], t["q"]) for n in ("k", "v", "w", "beta"))
    size = q.shape[2]
    system = torch.eye(size, dtype=q.dtype) + (beta[..., None] * (w @ w.mT)).tril(-1)
    solved = torch.linalg.solve_triangular(
        system, beta[..., None] * (w @ k.mT).tril(-1), upper=False, unitriangular=True
    )
    scores = q @ k.mT - (q @ w.mT).tril() @ solved
    if o["gated"]:
        total = t["g"].cumsum(-1)
        scores = scores + (total[..., :, None] - total[..., None, :])
    return masked(scores * o["scale"], fill=-torch.inf).softmax(-1) @ v


def deltaformer(t, o):
    q, k, v, beta = t["q"], t["k"], t["v"], t["beta"]
    scores = q @ k.mT * o["scale"]
    i, j = ids(q.shape[2])
    weights = scores.masked_fill(j >= i, NEG).softmax(-1).masked_fill(j >= i, 0.0)
    system = torch.eye(q.shape[2], dtype=q.dtype) + beta[..., None] * weights
    u = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
    return masked(scores).softmax(-1) @ u


def deltaformer_by_blocks(t, o):
    u = delta_values(t["q"], t["k"], t["v"], t["beta"], o["scale"], block=24)
    return masked(t["q"] @ t["k"].mT * o["scale"]).softmax(-1) @ u


def linear(t, name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"w.{name}.weight"])


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def gated_attention_qwen3next(t, o):
    x, width, first = t["x"], o["head_dim"], o["rotary_dim"]
    q, gate = linear(t, "q_proj", x).unflatten(-1, (-1, 2 * width)).chunk(2, -1)
    k, v = (linear(t, name, x).unflatten(-1, (-1, width)).transpose(1, 2) for name in ("k_proj", "v_proj"))
    q = norm(q, 1 + t["w.q_norm.weight"]).transpose(1, 2)
    k = norm(k, 1 + t["w.k_norm.weight"])
    q, k = (torch.cat([rotated(y[..., :first], t["cos"], t["sin"]), y[..., first:]], -1) for y in (q, k))
    k, v = grouped(k, q), grouped(v, q)
    out = (masked(q @ k.mT * width**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return linear(t, "o_proj", out * torch.sigmoid(gate.flatten(2)))


def latent_parts(t, o):
    """Queries (B, H, N, nope + rope), latents (B, N, C) and shared rotary keys (B, 1, N, rope)."""
    x, nope, rope = t["x"], o["qk_nope_head_dim"], o["qk_rope_head_dim"]
    if o["q_lora_rank"] is None:
        q = linear(t, "q_proj", x)
    else:
        q = linear(t, "q_b_proj", norm(linear(t, "q_a_proj", x), t["w.q_a_layernorm.weight"]))
    q = q.unflatten(-1, (-1, nope + rope)).transpose(1, 2)
    latent, k_rope = linear(t, "kv_a_proj_with_mqa", x).split([o["kv_lora_rank"], rope], -1)

    def turned(y: Tensor) -> Tensor:
        return rotated(y.unflatten(-1, (-1, 2)).mT.flatten(-2), t["cos"], t["sin"])

    q = torch.cat([q[..., :nope], turned(q[..., nope:])], -1)
    return q, norm(latent, t["w.kv_a_layernorm.weight"]), turned(k_rope[:, None])


def mla_deepseek_v3(t, o):
    q, latent, rope = latent_parts(t, o)
    nope, width = o["qk_nope_head_dim"], o["v_head_dim"]
    k, v = linear(t, "kv_b_proj", latent).unflatten(-1, (-1, nope + width)).transpose(1, 2).split([nope, width], -1)
    k = torch.cat([k, rope.expand(-1, k.shape[1], -1, -1)], -1)
    out = masked(q @ k.mT * o["scale"]).softmax(-1) @ v
    return linear(t, "o_proj", out.transpose(1, 2).flatten(2))


def mla_absorbed(t, o):
    """The same layer with its up-projections moved to the queries and behind the sum."""
    q, latent, rope = latent_parts(t, o)
    nope, width = o["qk_nope_head_dim"], o["v_head_dim"]
    weight = t["w.kv_b_proj.weight"].unflatten(0, (-1, nope + width))
    turned = q[..., nope:]
    q = torch.einsum("bhsd,hdc->bhsc", q[..., :nope], weight[:, :nope])
    scores = torch.einsum("bhsc,btc->bhst", q, latent) + torch.einsum("bhsr,btr->bhst", turned, rope[:, 0])
    summed = torch.einsum("bhst,btc->bhsc", masked(scores * o["scale"]).softmax(-1), latent)
    return linear(t, "o_proj", torch.einsum("bhsc,hdc->bshd", summed, weight[:, nope:]).flatten(2))


CASES = (
    *((softmax_attention, f"softmax_attention/{case}") for case in (
        "n64_causal_grad", "n200_gqa_causal", "n200_window32_gqa", "n70_bidir_pad_grad")),
    *((softmax_softcap, f"softmax_softcap/{case}") for case in ("n64_grad", "n200_window")),
    *((fn, f"softmax_sinks/{case}") for fn in (softmax_sinks, softmax_sinks_by_sum)
      for case in ("n64_gqa_grad", "n200_window32")),
    *((softmax_alibi, f"softmax_alibi/{case}") for case in ("n64_h4_grad", "n200_h3")),
    *((softmax_t5_bias, f"softmax_t5_bias/{case}") for case in ("n48_encoder_grad", "n100_decoder")),
    *((forgetting_attention, f"forgetting_attention/{case}") for case in ("n64_gqa_grad", "n200")),
    *((path_attention, f"path_attention/{case}") for case in ("n64_grad", "n128_gqa_gated")),
    *((fn, "deltaformer/n64_grad") for fn in (deltaformer, deltaformer_by_blocks)),
    *((gated_attention_qwen3next, f"gated_attention_qwen3next/{case}") for case in ("n64_gqa_grad", "n150")),
    *((fn, f"mla_deepseek_v3/{case}") for fn in (mla_deepseek_v3, mla_absorbed)
      for case in ("n64_qlora_grad", "n100_noqlora")),
)


class Layer(nn.Module):
    def __init__(self, fn, options) -> None:
        super().__init__()
        self.fn, self.options = fn, options

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.fn(tensors, self.options)


def off(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()


def name_of(value) -> str:
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("fn", "name"), CASES, ids=name_of)
def test_written_layer_reproduces_golden_vectors(fn, name: str, dtype: torch.dtype, golden) -> None:
    file = golden(name)
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in file.inputs.items()}
    grads = [k for k in given if f"grad_{k}" in file.tensors and not (k == "g" and "path" in name)]
    given = {k: x.requires_grad_(x.is_floating_point()) for k, x in given.items()}
    layer = torch.compile(Layer(fn, file.options), backend="attnc", options=OPTIONS)
    with torch.set_grad_enabled(bool(grads)):
        out = layer(given)
    regions = attention(attnc.last_report(layer))
    assert regions and regions[-1].choice.form == "dense"
    most, most_of_gradient = BOUNDS[dtype]
    assert off(out, file.outputs["out"]) < most
    if grads:
        found = torch.autograd.grad(out, [given[k] for k in grads], file.tensors["cot_out"].to(dtype))
        for k, grad in zip(grads, found, strict=True):
            assert off(grad, file.tensors[f"grad_{k}"]) < most_of_gradient, k


# --------------------------------------------------------------------------------------------------------------------
# Decoding over cached latents: DeepSeek-V3's inference code, naive and absorbed
# --------------------------------------------------------------------------------------------------------------------


class LatentDecode(nn.Module):
    """The layer over a cache of latents and rotary keys (B, S, C), (B, S, rope); returns both with the new tokens."""

    def __init__(self, weights: dict[str, Tensor], options: dict, absorbed: bool) -> None:
        super().__init__()
        self.w = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(x) for k, x in weights.items()})
        self.o, self.absorbed = options, absorbed

    def turned(self, x: Tensor, first: int) -> Tensor:
        """Pairs (2i, 2i + 1) of (B, T, ..., rope) turned by the position, as they lie."""
        rope = x.shape[-1]
        at = torch.arange(first, first + x.shape[1], dtype=x.dtype)
        angle = at[:, None] * self.o["rope_theta"] ** (-torch.arange(0, rope, 2, dtype=x.dtype) / rope)
        angle = angle.view(-1, *(1,) * (x.dim() - 3), rope // 2)
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, o, first = self.w, self.o, latent.shape[1]
        nope, width, heads = o["qk_nope_head_dim"], o["v_head_dim"], o["heads"]
        q = F.linear(norm(F.linear(x, w["wq_a_weight"]), w["q_norm_weight"]), w["wq_b_weight"])
        q = q.unflatten(-1, (heads, -1))
        q = torch.cat([q[..., :nope], self.turned(q[..., nope:], first)], -1)
        new, turning = F.linear(x, w["wkv_a_weight"]).split([o["kv_lora_rank"], o["qk_rope_head_dim"]], -1)
        latent = torch.cat([latent, norm(new, w["kv_norm_weight"])], 1)
        rope = torch.cat([rope, self.turned(turning, first)], 1)
        i, j = torch.arange(x.shape[1])[:, None] + first, torch.arange(latent.shape[1])
        mask = torch.where(j <= i, 0.0, -torch.inf).to(x.dtype)
        if self.absorbed:
            up = w["wkv_b_weight"].view(heads, -1, latent.shape[-1])
            scores = torch.einsum("bshc,btc->bsht", torch.einsum("bshd,hdc->bshc", q[..., :nope], up[:, :nope]), latent)
            scores = (scores + torch.einsum("bshr,btr->bsht", q[..., nope:], rope)) * o["scale"] + mask[:, None]
            summed = torch.einsum("bsht,btc->bshc", scores.softmax(-1), latent)
            out = torch.einsum("bshc,hdc->bshd", summed, up[:, -width:])
        else:
            kv = F.linear(latent, w["wkv_b_weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)
            k = torch.cat([kv[..., :nope], rope[:, None].expand(-1, heads, -1, -1)], -1)
            out = ((q.transpose(1, 2) @ k.mT * o["scale"] + mask).softmax(-1) @ kv[..., nope:]).transpose(1, 2)
        return F.linear(out.flatten(2), w["wo_weight"]), latent, rope


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("absorbed", [False, True], ids=["naive", "absorbed"])
def test_decode_over_cached_latents_reproduces_golden_vectors(absorbed: bool, dtype: torch.dtype, golden) -> None:
    file = golden("mla_absorbed_decode/prefill48_decode4")
    weights = {k[2:]: x.to(dtype) for k, x in file.inputs.items() if k.startswith("w.")}
    layer = LatentDecode(weights, file.options, absorbed)
    compiled = torch.compile(layer, backend="attnc", options=OPTIONS, dynamic=False)
    prefill, steps = file.inputs["x_prefill"].to(dtype), file.inputs["x_decode"].to(dtype)
    batch, most = prefill.shape[0], BOUNDS[dtype][0]
    latent, rope = (prefill.new_zeros(batch, 0, file.options[n]) for n in ("kv_lora_rank", "qk_rope_head_dim"))
    with torch.no_grad():
        out, latent, rope = layer(prefill, latent, rope)
        assert off(out, file.outputs["out_prefill"]) < most
        outs = []
        for step in steps.split(1, 1):
            out, latent, rope = compiled(step, latent, rope)
            outs.append(out)
            (region,) = attention(attnc.last_report(compiled))
            assert (region.shape.H, region.shape.Ev) == (1, file.options["kv_lora_rank"])
    for name, got in (("out_decode", torch.cat(outs, 1)), ("kv_cache", latent), ("pe_cache", rope)):
        assert off(got, file.outputs[name]) < most, name
