"""Layers whose keys are chosen by scores of the run, as they are written, compiled by attnc, against golden vectors.

Each is the formula of shared/golden/README.md in plain torch: its `topk` and scatter must become lists of the run.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnc
from tests.end_to_end.test_golden_attention import (
    BOUNDS,
    Layer,
    grouped,
    latent_parts,
    linear,
    masked,
    name_of,
    norm,
    off,
    rotated,
)
from tests.gallery_entry import NEG
from tests.gallery_run import attention

OPTIONS = {"inner": "eager", "force": "listed", "strict": True}


def listed(scores: Tensor, count: int) -> Tensor:
    """Which keys are among the `count` highest scores of their row."""
    found = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, found, True)


def dsa(t, o):
    dots = torch.relu(t["q_idx"] @ t["k_idx"][:, None].mT * t["q_idx"].shape[-1] ** -0.5)
    chosen = listed(masked(torch.einsum("bhst,bsh->bst", dots, t["w_idx"])), o["topk"])[:, None]
    k, v = grouped(t["k"], t["q"]), grouped(t["v"], t["q"])
    scores = masked(t["q"] @ k.mT * o["scale"]).masked_fill(~chosen, NEG)
    return scores.softmax(-1) @ v


def dsa_layer_deepseek_v32(t, o):
    x, rope, nope, width = t["x"], o["qk_rope_head_dim"], o["qk_nope_head_dim"], o["v_head_dim"]
    query = norm(linear(t, "q_a_proj", x), t["w.q_a_layernorm.weight"])
    qi = linear(t, "indexer.wq_b", query).unflatten(-1, (o["index_n_heads"], -1)).transpose(1, 2)
    ki = F.layer_norm(linear(t, "indexer.wk", x), (o["index_head_dim"],), t["w.indexer.k_norm.weight"],
                      t["w.indexer.k_norm.bias"], 1e-6)[:, None]  # fmt: skip
    qi, ki = (torch.cat([rotated(y[..., :rope], t["cos"], t["sin"]), y[..., rope:]], -1) for y in (qi, ki))
    dots = torch.relu(qi @ ki.mT * o["index_head_dim"] ** -0.5)
    weights = linear(t, "indexer.weights_proj", x) * o["index_n_heads"] ** -0.5
    chosen = listed(masked(torch.einsum("bhst,bsh->bst", dots, weights)), o["index_topk"])[:, None]
    q, latent, turned = latent_parts(t, o)
    k, v = linear(t, "kv_b_proj", latent).unflatten(-1, (-1, nope + width)).transpose(1, 2).split([nope, width], -1)
    k = torch.cat([k, turned.expand(-1, k.shape[1], -1, -1)], -1)
    scores = masked(q @ k.mT * (nope + rope) ** -0.5).masked_fill(~chosen, NEG)
    return linear(t, "o_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def doge_dma_layer(t, o):
    x, width = t["x"], o["head_dim"]
    q, k, v = (linear(t, f"{name}_proj", x).unflatten(-1, (-1, width)) for name in "qkv")
    step = torch.exp(t["w.A"] * F.softplus(linear(t, "dt_proj", v.flatten(2)))).transpose(1, 2)
    q, k = (rotated(norm(y, t[f"w.{name}_norm.weight"]).transpose(1, 2), t["cos"], t["sin"])
            for y, name in ((q, "q"), (k, "k")))  # fmt: skip
    bias = masked(step[:, :, None].expand(-1, -1, x.shape[1], -1))
    bias = bias.masked_fill(~listed(bias, o["keep_window_size"]), NEG)
    k, v, bias = (grouped(y, q) for y in (k, v.transpose(1, 2), bias))
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=o["scale"])
    return linear(t, "o_proj", out.transpose(1, 2).flatten(2))


CASES = (
    (dsa, "dsa/n64_k16_grad"),
    (dsa, "dsa/n200_k32"),
    (dsa_layer_deepseek_v32, "dsa_layer_deepseek_v32/n64_k16_grad"),
    (doge_dma_layer, "doge_dma_layer/n64_w16_grad"),
)


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("fn", "name"), CASES, ids=name_of)
def test_written_lists_reproduce_golden_vectors(fn, name: str, dtype: torch.dtype, golden) -> None:
    file = golden(name)
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in file.inputs.items()}
    grads = [k for k in given if f"grad_{k}" in file.tensors]
    given = {k: x.requires_grad_(k in grads) for k, x in given.items()}
    layer = torch.compile(Layer(fn, file.options), backend="attnc", options=OPTIONS)
    with torch.set_grad_enabled(bool(grads)):
        out = layer(given)
    assert [region.choice.form for region in attention(attnc.last_report(layer))] == ["listed"]
    most, most_of_gradient = BOUNDS[dtype]
    assert off(out, file.outputs["out"]) < most
    if grads:
        found = torch.autograd.grad(out, [given[k] for k in grads], file.tensors["cot_out"].to(dtype))
        for k, grad in zip(grads, found, strict=True):
            assert off(grad, file.tensors[f"grad_{k}"]) < most_of_gradient, k
