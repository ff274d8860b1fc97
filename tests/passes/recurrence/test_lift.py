"""Recurrence operators and gated short convolutions as regions: their facts, and what is near them and is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.op_recurrence import RECURRENCE
from attnc.region import Region, Unmatched
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

WIDTH, TAPS = 8, 3


class ShortConvolution(nn.Module):
    """Between two gates of one projection, as LFM2 has it; `how` says what is changed."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        groups = 2 if how == "grouped" else WIDTH
        padding = {"padded": 0, "joined": 0, "centred": TAPS // 2}.get(how, TAPS - 1)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, TAPS, groups=groups, padding=padding)
        self.inner, self.other = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, c, v = self.inner(x).mT.chunk(3, dim=1)
        if self.how == "two projections":
            c = self.other(x).mT
        u = v if self.how == "ungated" else b * v
        if self.how == "padded":
            u = F.pad(u, (TAPS - 1, 0))
        if self.how == "joined":
            u = torch.cat([u.new_ones(x.shape[0], WIDTH, TAPS - 1), u], -1)
        y = self.convolution(u)
        y = c * y[..., : x.shape[1]]
        return self.out((y + u if self.how == "residual" else y).mT)


class Mixer(nn.Module):
    """A recurrence behind a short convolution."""

    def __init__(self, rule: RecurrenceRule, state: str = "") -> None:
        super().__init__()
        self.rule, self.state = rule, state
        self.inner = nn.Linear(WIDTH, WIDTH + 2 * 4 + 2)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        B, L, _ = x.shape
        v, k, q, g = self.inner(x).split([WIDTH, 4, 4, 2], -1)
        v = F.silu(self.convolution(v.mT)[..., :L])
        initial = x.new_ones(B, 2, 4, WIDTH // 2) if "in" in self.state else None
        out, last = RECURRENCE(
            q[:, None], k[:, None], v.mT.view(B, L, 2, -1).transpose(1, 2), -g.mT.exp(), None, None, None, initial,
            self.rule.spell(),
        )  # fmt: skip
        out = out.transpose(1, 2).flatten(2)
        return (out, last) if "out" in self.state else out


def found(model: nn.Module, length: int = 33) -> tuple[list[Region], list[Unmatched]]:
    report = attnc.explain(model, torch.randn(2, length, WIDTH))
    return [r for r in report.regions if r.kind == "recurrence"], list(report.unmatched)


@pytest.mark.parametrize("how", ["", "padded", "joined", "residual"])
def test_a_gated_causal_short_convolution_is_a_mixer(how: str) -> None:
    (region,), _ = found(ShortConvolution(how))
    assert region.rule == RecurrenceRule(memory="taps", gate="write", conv=TAPS, state_in=how == "joined")
    assert region.shape == RecurrenceShape(B=2, H=WIDTH, L=33, K=1, V=1)
    assert region.written == "convolution" and region.path == "convolution" and region.training
    assert not region.choice.rewrites and region.flops == 2 * TAPS * 2 * WIDTH * 33


@pytest.mark.parametrize("how", ["ungated", "two projections", "grouped"])
def test_other_convolutions_are_no_mixers(how: str) -> None:
    regions, unmatched = found(ShortConvolution(how))
    assert regions == [] and not any(u.anchor.startswith("conv") for u in unmatched)


def test_a_convolution_that_sees_later_tokens_is_refused_by_name() -> None:
    regions, unmatched = found(ShortConvolution("centred"))
    (refused,) = (u for u in unmatched if u.anchor.startswith("conv"))
    assert regions == [] and "padding 1 before and 1 after" in refused.reason and refused.node == refused.anchor


@pytest.mark.parametrize("state", ["", "in", "out", "in and out"])
def test_the_operator_becomes_a_region_with_its_facts(state: str) -> None:
    rule = RecurrenceRule(decay="token", scale=0.5, chunk=16)
    (region,), _ = found(Mixer(rule, state))
    given = {"state_in": "in" in state, "state_out": "out" in state}
    assert region.rule == RecurrenceRule(decay="token", scale=0.5, chunk=16, conv=4, **given)
    assert region.shape == RecurrenceShape(B=2, H=2, L=33, K=4, V=4, Hk=1)
    assert region.facts["decay"] == "token" and region.facts["conv"] == 4 and region.facts["written"] == "operator"
    assert (region.dtype, region.training, region.path) == ("float32", True, "")


def test_reports_read_back_and_name_the_mixer() -> None:
    report = attnc.explain(Mixer(RecurrenceRule(decay="token", delta=True, chunk=16)), torch.randn(2, 33, WIDTH))
    assert attnc.Report.from_json(report.to_json()) == report
    assert "gated delta rule, L 33, heads 2/1, state 4 x 4" in report.to_text(400)


def test_a_symbolic_length_stays_symbolic() -> None:
    x = torch.randn(2, 33, WIDTH)
    torch._dynamo.mark_dynamic(x, 1)
    (region,) = attnc.explain(Mixer(RecurrenceRule(decay="token", chunk=16)), x).regions
    assert region.shape.L == 33 and set(region.shape.symbols) == {"L"}


def test_an_exported_operator_is_read_too() -> None:
    program = torch.export.export(Mixer(RecurrenceRule(decay="token", chunk=16)), (torch.randn(2, 33, WIDTH),))
    (region,) = attnc.explain(program).regions
    assert region.kind == "recurrence" and region.rule.conv == 4
