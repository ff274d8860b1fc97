"""transformers' generate() through attnc gives the tokens of eager, with dynamic and static caches."""

from __future__ import annotations

import warnings

import pytest
import torch

import attnc

transformers = pytest.importorskip("transformers")

NEW = 14
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
WINDOWED = {**COMMON, "sliding_window": 8}


def llama(attention: str):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, attn_implementation=attention))


def mistral(attention: str):
    return transformers.MistralForCausalLM(transformers.MistralConfig(**WINDOWED, attn_implementation=attention))


def gemma2(attention: str):
    config = transformers.Gemma2Config(**WINDOWED, head_dim=8, attn_implementation=attention)
    return transformers.Gemma2ForCausalLM(config)


def gemma3(attention: str):
    config = transformers.Gemma3TextConfig(**WINDOWED, head_dim=8, attn_implementation=attention)
    return transformers.Gemma3ForCausalLM(config)


def made(make, attention: str):
    torch.manual_seed(0)
    return make(attention).eval()


def prompt() -> dict[str, torch.Tensor]:
    """Two prompts of 12 and, padded on the left, 8 tokens: longer than the windows."""
    ids = torch.randint(2, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, **settings) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**prompt(), max_new_tokens=NEW, do_sample=False, **settings)


def forward_compiled(model, inner: str) -> None:
    options = {"inner": inner, "force": "dense", "strict": True}
    model.forward = torch.compile(model.forward, backend="attnc", options=options)


def slow_but(quick: set[tuple[str, str]]) -> list:
    """Each architecture in each spelling; what is not in `quick` is slow."""
    pairs = [(make, how) for make in (llama, mistral, gemma2, gemma3) for how in ("eager", "sdpa")]
    pairs.remove((gemma2, "sdpa"))  # its softcap has no sdpa spelling
    return [
        pytest.param(
            make, how, id=f"{make.__name__}-{how}", marks=() if (make.__name__, how) in quick else pytest.mark.slow
        )
        for make, how in pairs
    ]


@pytest.mark.parametrize(("make", "attention"), slow_but({("gemma2", "eager")}))
def test_dynamic_cache(make, attention):
    want = generated(made(make, attention), disable_compile=True)
    model = made(make, attention)
    forward_compiled(model, "eager")  # AOTAutograd takes as long again for lengths of the run
    assert torch.equal(generated(model), want)
    assert attnc.last_report(model.forward).graphs == 1


@pytest.mark.parametrize(("make", "attention"), slow_but({("mistral", "sdpa"), ("gemma3", "eager")}))
def test_static_cache(make, attention):
    want = generated(made(make, attention), disable_compile=True)
    model = made(make, attention)
    forward_compiled(model, "aot_eager")
    got = generated(model, cache_implementation="static")
    assert torch.equal(got, want)
    report = attnc.last_report(model.forward)
    assert report.counts()["rewritten"] == 2


def test_static_cache_compiled_by_generate_itself():
    want = generated(made(llama, "sdpa"), disable_compile=True)
    model = made(llama, "sdpa")
    options = {"inner": "aot_eager", "force": "dense", "strict": True}
    compile_config = transformers.CompileConfig(backend="attnc", mode=None, fullgraph=True, options=options)
    compile_config._compile_all_devices = True  # generate() compiles on accelerators only, unless it is told to
    got = generated(model, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(got, want)
    assert attnc.last_report(model).counts()["rewritten"] == 2


@pytest.mark.slow
def test_static_cache_through_inductor():
    want = generated(made(mistral, "sdpa"), disable_compile=True)
    model = made(mistral, "sdpa")
    model.forward = torch.compile(model.forward, backend="attnc", options={"force": "dense"})
    assert torch.equal(generated(model, cache_implementation="static"), want)
    assert attnc.last_report(model.forward).counts()["rewritten"] == 2
