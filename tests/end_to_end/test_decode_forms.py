"""Forms that are allowed by name serve prefill and decode with the model's own cache, and give what their own
reference gives in place of the model's attention; no decoded token makes a graph of its own."""

from __future__ import annotations

import warnings

import pytest
import torch

from attnc.forms import parse_form
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule
from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")

LENGTH, NEW = 24, 5
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
REFERENCE = "attnc_reference"


def made(attention: str, name: str = "Llama"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, head_dim=8, attn_implementation=attention)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def prompt(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 61, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : 5 if padded else 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, padded: bool = False, **settings):
    """Tokens, and the logits of each step."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(**prompt(padded), return_dict_in_generate=True, **settings)
    return found.sequences, torch.stack(found.logits)


def compiled(model, form: str, inner: str = "eager", **options):
    options = {"inner": inner, "allow": (form,), "force": form, "strict": True, **options}
    model.forward = torch.compile(model.forward, backend="attnc", options=options)
    return model


def referring(form: str):
    """A model whose attention is the form's own reference in the phases that it serves."""
    wanted = parse_form(form)

    def attend(module, query, key, value, attention_mask, scaling, **_):
        served = ("decode" if query.shape[2] == 1 else "prefill") in wanted.phases
        rule = f"score={scaling!r} * s" + ("; keep=p0[b, 0, i, j]; empty=zero" if attention_mask is not None else "")
        mask = [] if attention_mask is None else [attention_mask.expand(query.shape[0], 1, -1, -1)]
        given = Operands(query, key, value, mask, [], AttentionRule.parse(rule))
        out, _ = wanted.reference(given) if served else reference(given)
        return out.to(query.dtype).transpose(1, 2), None

    def full_mask(*args, **kwargs):
        return transformers.masking_utils.sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    transformers.AttentionInterface.register(REFERENCE, attend)
    transformers.AttentionMaskInterface.register(REFERENCE, full_mask)
    return made(REFERENCE)


SERVED = [  # form, cache, padded, spelling of the model
    ("token_top_k{top_k=6,sinks=2,window=3}", "static", True, "eager"),
    ("block_mixture{block=8,top_k=2}", "dynamic", True, "sdpa"),
]
SWEPT = [
    ("token_top_k{top_k=6}", "dynamic", False, "sdpa"),
    ("block_mixture{block=8,top_k=2}", "static", True, "eager"),
    ("page_bounds{block=4,top_k=2}", "dynamic", False, "eager"),
    ("page_bounds{block=4,top_k=2}", "static", True, "sdpa"),
    ("sinks_window{sinks=2,window=6}", "dynamic", True, "sdpa"),
    ("sinks_window{sinks=2,window=6}", "static", True, "sdpa"),
    ("sinks_window{sinks=2,window=6}", "static", True, "eager"),
    ("vertical_slash{columns=4,diagonals=4,last=8,sinks=1,window=2}", "dynamic", False, "sdpa"),
    ("cache_eviction{heavy=4,recent=4}", "dynamic", False, "sdpa"),
]
CASES = [*SERVED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SWEPT)]


@pytest.mark.parametrize(("form", "cache", "padded", "spelling"), CASES)
def test_generate_gives_what_the_reference_of_the_form_gives(form, cache, padded, spelling):
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    tokens, logits = generated(referring(form), padded)
    got, found = generated(compiled(made(spelling), form), padded, **settings)
    assert torch.equal(got, tokens)
    assert_close(found, logits)
