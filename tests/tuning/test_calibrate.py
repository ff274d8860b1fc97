"""Calibration: a stream of batches counted once, in the memory of one, the same whether it was stopped or not."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnc
from attnc.calibration import Calibration
from attnc.errors import UsageError
from attnc.tuning.calibrate import count

D, H, V, L = 16, 2, 11, 40
FORMS = ("sliding_window{window=8}", "block_mixture{block=64,top_k=2}", "sinks_window{sinks=2,window=5}")
BATCHES = 5


class Layer(nn.Module):
    def __init__(self, sharp: float) -> None:
        super().__init__()
        self.qkv, self.out, self.window = nn.Linear(D, 3 * D), nn.Linear(D, D), L
        with torch.no_grad():
            self.qkv.weight.mul_(sharp)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        if self.window < L:
            at = torch.arange(x.shape[1])
            back = at.unsqueeze(-1) - at
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < self.window))
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.layers = nn.ModuleList(Layer(3.0 + n) for n in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Stream:
    """Batches made one by one; `alive`: how many of those made before are in memory when the next is made."""

    def __init__(self, count: int = BATCHES, stop: int | None = None) -> None:
        self.count, self.stop, self.alive, self.made = count, stop, [], []

    def __iter__(self) -> Iterator[torch.Tensor]:
        draws = torch.Generator().manual_seed(1)
        for number in range(self.count):
            self.alive.append(sum(ref() is not None for ref in self.made))
            if number == self.stop:
                raise KeyboardInterrupt
            ids = torch.randint(V, (2, L), generator=draws)
            self.made.append(weakref.ref(ids))
            yield ids
            del ids


def calibrated(data: object, **given) -> Calibration:
    return attnc.calibrate(Model().eval(), data, forms=FORMS, pairs=3, **given)


@pytest.fixture(scope="module")
def whole() -> tuple[Calibration, Stream]:
    stream = Stream()
    return calibrated(stream), stream


def test_one_batch_is_in_memory_at_a_time(whole) -> None:
    assert whole[1].alive == [0] * BATCHES


def test_a_stopped_calibration_goes_on_and_ends_the_same(whole, tmp_path: Path) -> None:
    file, seen = tmp_path / "errors.json", []
    with pytest.raises(KeyboardInterrupt):
        calibrated(Stream(stop=2), file=file, on_progress=lambda found: seen.append(found.batches))
    assert seen == [1, 2] and Calibration.load(file).batches == 2
    assert calibrated(iter(Stream()), file=file) == Calibration.load(file) == whole[0]


def test_errors_mass_and_divergence_are_those_of_the_formula(whole) -> None:
    found = whole[0].regions["layers.0"].settings["sliding_window{window=8,dilation=1}"]
    model, windowed = Model().eval(), Model().eval()
    windowed.layers[0].window = 8
    errors, rows, masses, outputs, divergences = [], [], [], [], []
    at = torch.arange(L)
    causal = at.unsqueeze(-1) >= at
    near = causal & (at.unsqueeze(-1) - at < 8)
    with torch.no_grad():
        for ids in Stream():
            q, k, v = (t.double() for t in model.layers[0].heads(model.embed(ids)))
            score = q @ k.mT / q.shape[-1] ** 0.5
            exact, off = (score.masked_fill(~mask, -torch.inf).softmax(-1) for mask in (causal, near))
            gap = (off - exact) @ v
            errors.append(float(gap.norm() / (exact @ v).norm()))
            rows.append(float((gap.norm(dim=-1) / (exact @ v).norm(dim=-1)).max()))
            masses.append(float((exact * near).sum(-1).mean()))
            one, other = model(ids).double(), windowed(ids).double()
            outputs.append(float((one - other).norm() / one.norm()))
            terms = one.softmax(-1) * (one.log_softmax(-1) - other.log_softmax(-1))
            divergences.append(float(terms.sum(-1).mean()))
    assert found.batches == found.sampled == BATCHES and 0 < found.runs < BATCHES
    assert found.error == pytest.approx(max(errors), rel=1e-4)
    assert found.mean_error == pytest.approx(sum(errors) / BATCHES, rel=1e-4)
    assert found.row == pytest.approx(max(rows), rel=1e-4) and found.row > found.error
    assert found.mass == pytest.approx(sum(masses) / BATCHES, rel=1e-4)
    assert found.kept == pytest.approx(int(near.sum()) / int(causal.sum()))
    assert any(found.output == pytest.approx(output, rel=1e-3) for output in outputs)
    assert min(divergences) * 0.99 < found.kl <= found.worst_kl < max(divergences) * 1.01


def test_every_pair_has_its_turn_and_what_equals_the_region_is_none(whole) -> None:
    for region in whole[0].regions.values():
        assert all(measured.runs >= 1 for measured in region.settings.values())
        assert {name.partition("{")[0] for name in region.settings} == {"sliding_window", "sinks_window"}
        assert all(measured.mass > measured.kept for measured in region.settings.values())


def test_other_data_than_was_counted_is_refused(whole) -> None:
    with pytest.raises(UsageError, match="found another batch 0 than the one that the file has counted"):
        count(whole[0], None, {}, ((torch.zeros(2, L, dtype=torch.long),), {}), 0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"forms": ()}, "calibrate forms: found none"),
        ({"forms": "low_rank"}, "allowed is a tuple or list of form names"),
        ({"forms": ["dense"]}, "dense is exact"),
        ({"data": torch.ones(2)}, "calibrate data: found Tensor"),
        ({"data": []}, "calibrate data: found no inputs"),
        ({"batches": 0}, "calibrate batches=0: allowed is a whole number from 1"),
        ({"pairs": -1}, "calibrate pairs=-1: allowed is a whole number from 0"),
        ({"model": torch.nn.Linear}, "calibrate a model: found the class Linear"),
    ],
)
def test_a_mistake_is_a_sentence(given, says: str) -> None:
    asked = {"model": Model(), "data": [torch.zeros(2, L)], "forms": FORMS, **given}
    with pytest.raises(UsageError, match=says):
        attnc.calibrate(asked.pop("model"), asked.pop("data"), **asked)


def test_a_model_that_no_form_applies_to_is_refused() -> None:
    with pytest.raises(UsageError, match="calibrate Linear: found no region that one of low_rank applies to"):
        attnc.calibrate(nn.Linear(3, 3), [torch.ones(2, 3)], forms=["low_rank"])
