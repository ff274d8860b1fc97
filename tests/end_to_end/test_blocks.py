"""Blocks in torch.nn alone: every region found, by Dynamo and in exported programs, and the numbers kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnc
from tests.gallery_blocks import WHOLES
from tests.tiny import compiled
from tests.tolerance import assert_close

every_block = pytest.mark.parametrize("name", WHOLES)


def made(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return WHOLES[name].make(), WHOLES[name].inputs()


@every_block
@pytest.mark.parametrize("training", [False, True])
def test_regions_are_found_and_attentions_rewritten(name: str, training: bool) -> None:
    model, inputs = made(name)
    model.train(training)
    fast = compiled(model, inner="eager")
    with torch.set_grad_enabled(training):
        got = fast(*inputs)
        assert_close(got, model(*inputs))
    report = attnc.last_report(fast)
    counts = report.counts()
    assert counts["kinds"] == WHOLES[name].holds
    assert tuple(entry.reason for entry in report.unmatched) == WHOLES[name].refused
    assert counts["rewritten"] == WHOLES[name].holds["attention"]


@every_block
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_the_same_regions(name: str, strict: bool) -> None:
    model, inputs = made(name)
    program = torch.export.export(model.eval(), inputs, strict=strict)
    assert attnc.explain(program).counts()["kinds"] == WHOLES[name].holds
