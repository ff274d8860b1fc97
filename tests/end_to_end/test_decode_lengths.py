"""Decoding with a cache that grows, through forms that choose keys or drop pairs: what the form's own reference gives,
in as many graphs as Dynamo makes by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import attnc
from attnc.forms import parse_form
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.passes import choose
from attnc.plan import Plan
from attnc.region import Choice
from attnc.rule_attention import AttentionRule
from tests.tolerance import assert_close

HEADS, KEY_HEADS, E, START, NEW = 4, 2, 8, 20, 6
PREFILL = "score=0.35355339 * s; keep=j - i <= 0"
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)


class Layer(nn.Module):
    """Self-attention whose keys and values are put behind those of a cache."""

    def __init__(self, attend: Attend = sdpa) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * E
        self.query, self.key, self.value = (nn.Linear(width, n * E) for n in (HEADS, KEY_HEADS, KEY_HEADS))
        self.out, self.attend = nn.Linear(width, width), attend

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None):
        query, key, value = (
            p(x).unflatten(-1, (-1, E)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )  # fmt: skip
        if past is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(past, (key, value), strict=True))
        return self.out(self.attend(query, key, value, past is None).transpose(1, 2).flatten(2)), (key, value)


def referring(form: str) -> Attend:
    """The form's reference in the phases that it serves."""
    wanted = parse_form(form)

    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        rule = AttentionRule.parse(PREFILL if is_causal else "score=0.35355339 * s")
        given = Operands(query, key, value, [], [], rule)
        served = ("prefill" if is_causal else "decode") in wanted.phases
        return (wanted.reference(given) if served else reference(given))[0].to(query.dtype)

    return attend


def decoded(layer: Callable, new: int = NEW) -> Tensor:
    """The outputs of one prompt and of `new` tokens after it, each row the next one's input."""
    x = torch.randn(2, START, HEADS * E, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, past = layer(x)
        rows = [out]
        for _ in range(new):
            out, past = layer(rows[-1][:, -1:].clone(), past)
            rows.append(out)
    return torch.cat(rows, 1)


def compiled(form: str | None, *, dynamic: bool | None = None, inner: str = "eager", **options) -> Callable:
    given = {} if form is None else {"allow": (form,), "force": form}
    options = {"inner": inner, "strict": True, **given, **options}
    return torch.compile(Layer(), backend="attnc", dynamic=dynamic, options=options)


def graphs_of(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    torch._dynamo.reset()
    counters.clear()
    return run(), counters["stats"]["unique_graphs"]


@functools.cache
def least_graphs(dynamic: bool | None) -> int:
    return graphs_of(lambda: decoded(torch.compile(Layer(), backend="eager", dynamic=dynamic)))[1]


def served(form: str, dynamic: bool | None, inner: str, *marks):
    return pytest.param(form, dynamic, inner, id=f"{form.partition('{')[0]}-{inner}", marks=marks)


FORMS = [
    served("token_top_k{top_k=6,sinks=1,window=2}", True, "aot_eager"),
    served("token_top_k{top_k=6,share=all}", None, "inductor", pytest.mark.slow),
    served("block_mixture{block=4,top_k=2,share=group}", None, "eager"),
    served("page_bounds{block=4,top_k=2}", None, "eager"),
    served("vertical_slash{columns=4,diagonals=4,last=8,sinks=1,window=2}", True, "eager", pytest.mark.slow),
    served("cache_eviction{heavy=4,recent=4}", True, "eager"),
    served("hash_buckets{chunk=8,buckets=4,rounds=2}", True, "aot_eager", pytest.mark.slow),
    served("sinks_window{sinks=2,window=6}", None, "aot_eager"),
    served("sliding_window{window=6}", True, "inductor", pytest.mark.slow),
]


@pytest.mark.parametrize(("form", "dynamic", "inner"), FORMS)
def test_a_growing_cache_gives_what_the_reference_gives_in_no_more_graphs_than_eager(form, dynamic, inner) -> None:
    wanted = decoded(Layer(referring(form)))
    least = least_graphs(dynamic)
    got, graphs = graphs_of(lambda: decoded(compiled(form, dynamic=dynamic, inner=inner)))
    assert graphs == least
    assert_close(got, wanted)
    assert float((got - decoded(Layer())).abs().max()) > 0.01  # of the others, which are dropped


def test_groups_of_heads_decode_each_by_its_form() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        few = referring("token_top_k{top_k=6}")(query[:, 2:], key[:, 1:], value[:, 1:], is_causal)
        return torch.cat([sdpa(query[:, :2], key[:, :1], value[:, :1], is_causal), few], 1)

    got = decoded(compiled("head_groups{of=1*dense&1*token_top_k(top_k=6)}"))
    assert_close(got, decoded(Layer(attend)))


@pytest.mark.parametrize("form", ["block_mixture{block=4,top_k=64}", "sinks_window{window=128}"])
def test_a_budget_that_keeps_every_key_changes_nothing(form: str) -> None:
    assert_close(decoded(compiled(form)), decoded(Layer()))


def test_dense_decoding_over_a_growing_cache_is_exact_in_either_spelling() -> None:
    assert_close(decoded(compiled(None, force="dense", inner="aot_eager")), decoded(Layer()))


def test_a_plan_by_path_serves_prompt_and_decoding() -> None:
    form = "token_top_k{top_k=6}"
    plan = Plan({"": Choice(form, "chosen by hand")}, "cpu")
    layer = compiled(None, plan=plan, allow=("token_top_k",))
    assert_close(decoded(layer), decoded(Layer(referring(form))))
    assert "by the plan for cpu" in attnc.last_report(layer).regions[0].choice.reason


def test_a_length_that_changes_the_choice_is_compiled_anew_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def crossover(region, *_) -> int:
        asked.append(region.shape.S)
        return 24 if region.shape.S < 24 else 10**6

    monkeypatch.setattr(choose, "crossover", crossover)
    choose._choose.cache_clear()
    layer = compiled(None, allow=("block_mixture",), forms=("block_mixture",))
    _, graphs = graphs_of(lambda: decoded(layer, 9))
    reason = attnc.last_report(layer).regions[0].choice.reason
    assert graphs == 4 and sorted(asked) == [20, 21, 22, 24]
    assert "at the example's 1 x 24" in reason and "from length 1000000 on it would" in reason
    choose._choose.cache_clear()
