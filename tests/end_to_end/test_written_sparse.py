"""Models of transformers that are written sparse are found as what they mean, and compute what eager computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import attnc
from tests.gallery_run import attention

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}


def deepseek_v32() -> torch.nn.Module:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1}
    return transformers.DeepseekV32Model(
        transformers.DeepseekV32Config(**SIZES, **LATENT, **EXPERTS, **INDEXER, **heads, max_position_embeddings=128)
    )


def doge() -> torch.nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.DogeConfig(**SIZES, **heads, keep_window_size=8, max_position_embeddings=128)
    return transformers.DogeModel(config)


def minimax_m3() -> torch.nn.Module:
    kinds = {"layer_types": ["minimax_m3_sparse"], "mlp_layer_types": ["dense"]}
    blocks = {"index_block_size": 8, "index_topk_blocks": 3, "index_local_blocks": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 64}
    given = {**SIZES, **INDEXER, **kinds, **blocks, **heads, **experts, "shared_intermediate_size": 32}
    del given["index_topk"]
    given["max_position_embeddings"] = 128
    return transformers.AutoModel.from_config(transformers.MiniMaxM3VLTextConfig(**given))


def longformer() -> torch.nn.Module:
    config = transformers.LongformerConfig(
        **SIZES, num_attention_heads=2, attention_window=[8], max_position_embeddings=128, pad_token_id=1
    )
    return transformers.LongformerModel(config, add_pooling_layer=False)


def led() -> torch.nn.Module:
    config = transformers.LEDConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, attention_window=[8, 16],
        max_encoder_position_embeddings=128, max_decoder_position_embeddings=128,
    )  # fmt: skip
    return transformers.LEDModel(config)


def longt5() -> torch.nn.Module:
    config = transformers.LongT5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, local_radius=7, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.LongT5EncoderModel(config)


def transient_global() -> torch.nn.Module:
    config = transformers.LongT5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, local_radius=7, global_block_size=4,
        encoder_attention_type="transient-global", dropout_rate=0.0,
    )  # fmt: skip
    return transformers.LongT5EncoderModel(config)


def reformer() -> torch.nn.Module:
    config = transformers.ReformerConfig(
        vocab_size=64, hidden_size=32, attention_head_size=16, num_attention_heads=2, feed_forward_size=64,
        attn_layers=["local", "lsh"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 16], num_buckets=4, num_hashes=2,
        local_attn_chunk_length=8, lsh_attn_chunk_length=8, max_position_embeddings=64, hash_seed=0,
        hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ReformerModel(config)


def bigbird() -> torch.nn.Module:
    config = transformers.BigBirdConfig(
        **SIZES, num_attention_heads=2, attention_type="block_sparse", block_size=4, num_random_blocks=2,
        max_position_embeddings=128,
    )  # fmt: skip
    return transformers.BigBirdModel(config, add_pooling_layer=False)


def ids() -> torch.Tensor:
    return torch.randint(5, 64, (2, 64), generator=torch.Generator().manual_seed(0))


def made(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return build().eval()


def compare(model: torch.nn.Module, got: torch.Tensor, want: torch.Tensor) -> None:
    """Outputs agree, and gradients where there are any."""
    assert (got - want).abs().max() <= 1e-4
    if not want.requires_grad:
        return
    found = []
    for out in (got, want):
        model.zero_grad(set_to_none=True)
        out.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp_min(1e-3), name


CHOSEN = {
    deepseek_v32: ("j in t0[b, i, :8] and j - i <= 0", True),
    minimax_m3: ("(j // 8) in t0[b, h // 2, i, :3] and j - i <= 0", False),
    doge: ("j in t2[b, h // 2, i, :8] and j - i <= 0", True),
}


@pytest.mark.parametrize("build", CHOSEN, ids=lambda f: f.__name__)
def test_indexer_and_dynamic_mask_run_as_lists(build) -> None:
    keep, trains = CHOSEN[build]
    model, tokens = made(build), ids()
    options = {"inner": "aot_eager", "force": "listed", "strict": True}
    compiled = torch.compile(model, backend="attnc", options=options)
    with torch.set_grad_enabled(trains):
        got, want = (f(input_ids=tokens).last_hidden_state for f in (compiled, model))
    (region,) = attention(attnc.last_report(compiled))
    assert region.choice.form == "listed" and region.facts["keep"] == keep
    compare(model, got, want)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build", [longformer, led])
def test_sliding_chunks_are_windows(build, padded: bool) -> None:
    model, tokens = made(build), ids()
    kept = torch.ones_like(tokens)
    kept[1, 50:] = 1 - padded
    compiled = torch.compile(model, backend="attnc", options={"inner": "aot_eager", "force": "dense", "strict": True})
    got, want = (f(input_ids=tokens, attention_mask=kept).last_hidden_state for f in (compiled, model))
    report = attnc.last_report(compiled)
    windows = [region for region in attention(report) if region.columns]
    assert [region.columns for region in windows] == ([9] if build is longformer else [9, 17])
    assert all(region.mask == "window" and region.choice.form == "dense" for region in windows)
    compare(model, got * kept[..., None], want * kept[..., None])


@pytest.mark.parametrize("trains, cut", [(False, 0), (False, 3), (True, 0)])
def test_blocks_of_longt5_are_windows_with_a_bias(trains: bool, cut: int) -> None:
    model, tokens = made(longt5), ids()[:, : 64 - cut]
    kept = torch.ones_like(tokens)
    kept[1, 50:] = 0
    options = {"inner": "aot_eager", "strict": True} | ({} if trains else {"force": "dense"})
    compiled = torch.compile(model, backend="attnc", options=options)
    with torch.set_grad_enabled(trains):
        for mask in (kept, torch.ones_like(tokens)):
            got, want = (f(input_ids=tokens, attention_mask=mask).last_hidden_state for f in (compiled, model))
            compare(model, got, want)
    regions = attention(attnc.last_report(compiled))
    # A gradient reaches all columns of a row without keys: training keeps the blocks.
    assert [region.columns for region in regions] == [0 if trains else 24] * 2
    assert trains or all(region.choice.form == "dense" and region.facts["bias"] for region in regions)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build, regions", [(transient_global, 1), (reformer, 2)])
def test_what_is_no_window_runs_as_the_blocks_it_is_written_in(build, regions: int, padded: bool) -> None:
    model, tokens = made(build), ids()
    kept = torch.ones_like(tokens)
    kept[1, 50:] = 1 - padded
    compiled = torch.compile(model, backend="attnc", options={"inner": "aot_eager", "strict": True})
    with torch.no_grad():
        got, want = (f(input_ids=tokens, attention_mask=kept).last_hidden_state for f in (compiled, model))
    compare(model, got, want)
    found = attention(attnc.last_report(compiled))
    assert [(region.choice.form, region.columns) for region in found] == [("dense", 0)] * regions


def test_gathered_blocks_are_left_by_their_name() -> None:
    with torch.no_grad():
        report = attnc.explain(made(bigbird), input_ids=ids())
    assert any("columns several products make" in item.reason for item in report.unmatched)
