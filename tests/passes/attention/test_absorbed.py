"""Latent attention written absorbed: expanded where that is predicted faster, kept in a decode step, always equal."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import attnc
from attnc.passes import check
from attnc.passes.attention import absorb, folded
from attnc.passes.attention.latent import LatentShape
from tests.gallery_family_a import KnockingHeads
from tests.gallery_run import assert_same, attention, attnc_compiled, run

HEADS, NOPE, ROPE, RANK, WIDTH, LENGTH = 4, 16, 8, 64, 10, 70


class Absorbed(nn.Module):
    """The scores as two einsum products over the latent and the rotary channels, heads before rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(RANK, HEADS * (NOPE + WIDTH), bias=False)
        self.q = nn.Linear(20, HEADS * (NOPE + ROPE), bias=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query rows (B, L, H, nope) and (B, L, H, rope), the up-projections of keys and values."""
        w = self.up.weight.view(HEADS, NOPE + WIDTH, RANK)
        return *self.q(x).view(*x.shape[:2], HEADS, -1).split([NOPE, ROPE], -1), w[:, :NOPE], w[:, NOPE:]

    def mask(self, L: int, S: int) -> Tensor:
        return torch.full((L, S), -torch.inf, device=self.up.weight.device).triu(S - L + 1)

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        nope, rotary, up_k, up_v = self.parts(x)
        rows = self.rows(torch.einsum("blhd,hdc->bhlc", nope, up_k))
        scores = torch.einsum("bhlc,bsc->bhls", rows, latent) + torch.einsum("blhr,bsr->bhls", rotary, rope)
        weights = (scores * 0.2 + self.mask(x.shape[1], latent.shape[1])).softmax(-1)
        summed = self.summed(torch.einsum("bhls,bsc->bhlc", weights, self.values(latent)))
        return torch.einsum("bhlc,hdc->blhd", summed, up_v).flatten(2)

    def rows(self, rows: Tensor) -> Tensor:
        return rows

    def values(self, latent: Tensor) -> Tensor:
        return latent

    def summed(self, summed: Tensor) -> Tensor:
        return summed


class DeepSeek(Absorbed):
    """As DeepSeek's own inference code: rows before heads everywhere."""

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        nope, rotary, up_k, up_v = self.parts(x)
        rows = torch.einsum("bshd,hdc->bshc", nope, up_k)
        scores = torch.einsum("bshc,btc->bsht", rows, latent) + torch.einsum("bshr,btr->bsht", rotary, rope)
        scores = scores * 0.2 + self.mask(x.shape[1], latent.shape[1]).unsqueeze(1)
        summed = torch.einsum("bsht,btc->bshc", scores.softmax(-1), latent)
        return torch.einsum("bshc,hdc->bshd", summed, up_v).flatten(2)


class Batched(Absorbed):
    """bmm over heads before and behind a call of SDPA whose one key head is expanded; the value is a slice of it."""

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        nope, rotary, up_k, up_v = self.parts(x)
        B, L = x.shape[:2]
        rows = torch.bmm(nope.permute(2, 0, 1, 3).reshape(HEADS, B * L, NOPE), up_k)
        query = torch.cat([rows.view(HEADS, B, L, RANK).transpose(0, 1), rotary.transpose(1, 2)], -1)
        key = torch.cat([latent, rope], -1)[:, None].expand(-1, HEADS, -1, -1)
        mask = self.mask(L, latent.shape[1])
        out = F.scaled_dot_product_attention(query, key, key[..., :RANK], attn_mask=mask, scale=0.2)
        out = torch.bmm(out.transpose(0, 1).reshape(HEADS, B * L, RANK), up_v.transpose(1, 2))
        return out.view(HEADS, B, L, WIDTH).permute(1, 2, 0, 3).flatten(2)


class Broadcast(Absorbed):
    """matmul with weights that broadcast over the batch, rotary scores first, as absorbed code on transformers does."""

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        nope, rotary, up_k, up_v = self.parts(x)
        rows = torch.matmul(nope.transpose(1, 2), up_k)
        scores = torch.matmul(rotary.transpose(1, 2), rope.unsqueeze(1).mT)
        scores = (scores + torch.matmul(rows, latent.unsqueeze(-3).mT)) * 0.2
        weights = (scores + self.mask(x.shape[1], latent.shape[1])).softmax(-1)
        summed = torch.matmul(weights, latent.unsqueeze(1))
        return torch.matmul(summed, up_v.mT).transpose(1, 2).flatten(2)


class Biased(Broadcast):
    """The values' up-projection has a bias, which stands behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS * WIDTH))

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        return super().forward(x, latent, rope) + self.bias


class Normed(Broadcast):
    """Keys and values are made from the same normed latents."""

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        return super().forward(x, F.rms_norm(latent, (RANK,)), rope)


class NormedValues(Absorbed):
    def values(self, latent: Tensor) -> Tensor:
        return F.rms_norm(latent, (RANK,))


class OtherLatents(Absorbed):
    def values(self, latent: Tensor) -> Tensor:
        return latent.flip(1)


class NormedSum(Absorbed):
    def summed(self, summed: Tensor) -> Tensor:
        return F.rms_norm(summed, (RANK,))


class ScaledHeads(Absorbed):
    def rows(self, rows: Tensor) -> Tensor:
        return rows * torch.arange(1.0, HEADS + 1)[:, None, None]


class FoldedQuery(Absorbed):
    """One weight gives the absorbed rows: W_q and the keys' up-projection multiplied beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.folded = nn.Linear(20, HEADS * RANK, bias=False)

    def rows(self, rows: Tensor) -> Tensor:
        return self.folded(self.x).view(*self.x.shape[:2], HEADS, RANK).transpose(1, 2)

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        self.x = x
        return super().forward(x, latent, rope)


class FoldedOut(Absorbed):
    """One weight reads the summed latents: the values' up-projection and W_o multiplied beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(HEADS * RANK, 20, bias=False)

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        nope, rotary, up_k, _ = self.parts(x)
        rows = torch.einsum("blhd,hdc->bhlc", nope, up_k)
        scores = torch.einsum("bhlc,bsc->bhls", rows, latent) + torch.einsum("blhr,bsr->bhls", rotary, rope)
        summed = (scores * 0.2).softmax(-1) @ latent[:, None]
        return self.out(summed.transpose(1, 2).flatten(2))


def inputs(rows: int = LENGTH) -> tuple[Tensor, ...]:
    return torch.randn(2, rows, 20), torch.randn(2, LENGTH, RANK), torch.randn(2, LENGTH, ROPE)


def compared(model: nn.Module, args: tuple[Tensor, ...], backward: bool = False, **options):
    """The report of a model that attnc computes as eager does."""
    want = run(model, args, backward)
    model.zero_grad()
    compiled = attnc_compiled(model, **{"inner": "eager", **options})
    assert_same(run(compiled, args, backward, named=model), want)
    return attnc.last_report(compiled)


WRITTEN = {"einsum": Absorbed, "deepseek": DeepSeek, "bmm": Batched, "matmul": Broadcast}
EQUAL = {"bias_behind": Biased, "norm_before": Normed}


@pytest.mark.parametrize("name", WRITTEN | EQUAL)
@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_prefill_written_absorbed_is_expanded(name: str, backward: bool) -> None:
    inner = "aot_eager" if name == "einsum" else "eager"
    report = compared((WRITTEN | EQUAL)[name](), inputs(), backward, inner=inner)
    (region,) = attention(report)
    assert (region.shape.H, region.shape.E, region.shape.Ev) == (HEADS, NOPE + ROPE, WIDTH)
    (note,) = report.notes
    assert "keys and values of 4 heads made from its latents, not as written" in note and "predicted on cpu" in note
    assert not report.problems


@pytest.mark.parametrize("name", ["einsum", "deepseek"])
def test_lengths_of_the_run_are_nodes_of_the_graph(name: str, monkeypatch) -> None:
    graphs: list[fx.Graph] = []
    change_order = absorb.change_order
    monkeypatch.setattr(absorb, "change_order", lambda graph, found: (change_order(graph, found), graphs.append(graph)))
    args = inputs()
    for x in args:
        torch._dynamo.mark_dynamic(x, 1)
    model = WRITTEN[name]()
    with torch.no_grad():
        want = model(*args)
        compiled = attnc_compiled(model, inner="eager")
        assert (compiled(*args) - want).abs().max() < 1e-5
    report = attnc.last_report(compiled)
    assert "L" in attention(report)[0].shape.symbols
    assert report.notes and "not as written" in report.notes[0] and not report.problems
    given = [x for graph in graphs for node in graph.nodes for x in tree_leaves((node.args, node.kwargs))]
    assert graphs and not any(isinstance(x, torch.SymInt) for x in given)


@pytest.mark.parametrize("name", ["bmm", "deepseek"])
def test_a_decode_step_written_absorbed_stays_so(name: str) -> None:
    report = compared(WRITTEN[name](), inputs(1))
    (region,) = attention(report)
    assert region.shape.H == 1 and region.shape.E == RANK + ROPE and not report.problems
    assert not any("not as written" in note for note in report.notes)


def test_a_decode_step_says_why_it_stays() -> None:
    (note,) = compared(Batched(), inputs(1)).notes
    assert "over its latents of 64 channels, as written" in note and "against" in note


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (NormedValues, "not expanded from the same latents"),
        (OtherLatents, "not expanded from the same latents"),
        (NormedSum, "its sum's 64 latent channels are read off rms_norm"),
        (ScaledHeads, "the query's 64 latent channels are read off mul"),
        (FoldedQuery, "the query's 64 latent channels are read off linear"),
        (FoldedOut, "its sum's 64 latent channels are read off linear"),
    ],
)
def test_what_cannot_be_expanded_is_refused_in_a_sentence(model: type[nn.Module], says: str) -> None:
    report = compared(model(), inputs())
    (region,) = attention(report)
    assert region.shape.H == 1 and not report.problems
    (note,) = report.notes
    assert says in note and "stays so" in note and note.endswith(".")


def test_weights_updated_after_compile_are_used() -> None:
    model, args = Absorbed(), inputs()
    compiled = attnc_compiled(model, inner="eager")
    with torch.no_grad():
        compiled(*args)
        model.up.weight.mul_(1.5)
        assert (compiled(*args) - model(*args)).abs().max() < 1e-5


def test_the_order_follows_the_device_that_is_asked_for() -> None:
    notes = attnc.explain(Absorbed(), *inputs(), device="h100").notes
    assert any("predicted on h100" in note for note in notes)


def test_a_wrong_expansion_is_caught_and_left_as_written(monkeypatch, tmp_path) -> None:
    per_head = absorb._per_head_of

    def wrong(emit, matrix):
        return emit(torch.ops.aten.mul.Tensor, per_head(emit, matrix), 1.01)

    monkeypatch.setattr(absorb, "_per_head_of", wrong)
    report = compared(Absorbed(), inputs(), store=str(tmp_path))
    (region,) = attention(report)
    assert region.shape.H == 1 and not report.notes
    assert any("its output differs by" in problem and "left as written" in problem for problem in report.problems)


@pytest.fixture
def deepseek_v3(monkeypatch, tmp_path):
    """Explains a prefill of 4,096 tokens at DeepSeek-V3's widths, on meta: the report, and how large what is run is."""
    drawn, sizes = check.drawn, []

    def watched(written):
        data = drawn(written)
        sizes.extend(x.numel() for x in data)
        return data

    monkeypatch.setattr(check, "drawn", watched)
    for name, size in (("HEADS", 128), ("NOPE", 128), ("ROPE", 64), ("RANK", 512), ("WIDTH", 128)):
        monkeypatch.setattr(sys.modules[__name__], name, size)

    def explain(model: type[nn.Module]) -> tuple[attnc.Report, list[int]]:
        with torch.device("meta"), torch.no_grad():
            args = [torch.randn(1, 4096, width) for width in (20, 512, 64)]
            return attnc.explain(model(), *args, device="h200", options={"store": str(tmp_path)}), sizes

    return explain


@pytest.mark.parametrize("name", ["einsum", "deepseek", "bmm"])
def test_a_prefill_of_deepseek_v3_is_tried_at_few_heads_of_few_channels(deepseek_v3, name: str) -> None:
    report, sizes = deepseek_v3(WRITTEN[name])
    (region,) = attention(report)
    assert (region.shape.H, region.shape.L) == (128, 4096) and not report.problems
    assert "over keys and values of 128 heads made from its latents, not as written" in report.notes[0]
    assert sizes and max(sizes) < 1 << 16


def test_a_wrong_expansion_is_caught_at_few_heads_too(deepseek_v3, monkeypatch) -> None:
    per_head = absorb._per_head_of
    wrong = lambda emit, matrix: emit(torch.ops.aten.mul.Tensor, per_head(emit, matrix), 1.01)  # noqa: E731
    monkeypatch.setattr(absorb, "_per_head_of", wrong)
    report, sizes = deepseek_v3(Absorbed)
    (problem,) = report.problems
    assert "its output differs by" in problem and not report.notes and max(sizes) < 1 << 16


def test_fewer_heads_keep_proportions_and_are_given_up_where_numbers_mix() -> None:
    v3 = LatentShape(B=1, H=128, L=4096, S=4096, nope=128, rope=64, rank=512, width=128)
    small = absorb.narrower(v3)
    assert [small[n] for n in (128, 64, 512, 192, 576, 256)] == [8, 4, 32, 12, 36, 16]
    assert small[128 * 256] == small[128] * small[256] == 128
    assert not absorb.narrower(replace(v3, B=128)) and not absorb.narrower(replace(v3, rope=5))
    assert not absorb.narrower(replace(v3, H=8, rank=1024))  # 8 heads of 128 channels are as many as the latents


def test_a_wrong_fold_is_caught_and_left_as_written(monkeypatch, tmp_path) -> None:
    fold = folded._fold

    def transposed(graph, node, views):
        with graph.inserting_before(node):
            swapped = graph.call_function(torch.ops.aten.t.default, (node.args[1],))
        swapped.meta["val"] = node.args[1].meta["val"].t()
        node.args = (node.args[0], swapped)
        fold(graph, node, views)

    model, x = KnockingHeads(), torch.randn(2, 70, 64)
    with torch.no_grad():
        for matrix in (model.knock_q, model.knock_k, model.knock_v):
            matrix.normal_()
    monkeypatch.setattr(folded, "_fold", transposed)
    report = compared(model, (x,), store=str(tmp_path))
    assert len(report.problems) == 3 and not report.notes
    assert all("its output differs by" in problem and "left as written" in problem for problem in report.problems)


def test_a_change_is_tried_at_a_smaller_length_where_its_own_is_dear() -> None:
    report = compared(Broadcast(), (torch.randn(2, 1030, 20), torch.randn(2, 1030, RANK), torch.randn(2, 1030, ROPE)))
    assert [region.shape.H for region in attention(report)] == [HEADS] and not report.problems
