"""Train the small language model of bytes of `byte_model.py`, on which approximations can be judged.

    python examples/train_byte_model.py [--steps 2700] [--out examples/byte_model.safetensors] [--threads 2]

Lengths grow from 32 to 1,024 bytes: what was said before is found among few places first. Every 100 steps it judges
itself, writes a line to the log beside the weights, and saves a checkpoint, from which the same command goes on after
an interruption. Matrices are trained by Muon, in float32 (torch.optim.Muon multiplies in bfloat16, which CPUs without
such units do several times slower), the rest by AdamW; with AdamW alone, recall was not learnt in as many steps.
"""

from __future__ import annotations

import argparse
import math
import random
import string
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from byte_model import CONTEXT, TASKS, WEIGHTS, Sample, batch, judged, new_model
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

TOKENS, ROWS = 4096, 4  # of a step, at least
LENGTHS = ((0.0, 32), (0.04, 64), (0.08, 128), (0.14, 256), (0.25, 512), (0.45, CONTEXT))  # from this part of the steps
SHORTEST = {"text": 256, "needle": 128}  # of these, whatever the others have
MIX = ("text", "recall", "needle", "recall", "text", "recall", "needle", "copy")  # batches in turn
MUON, ADAM = 0.02, 3e-3  # learning rates of matrices, of embeddings, norms and biases
WARM, DECAY = 30, 0.4  # steps until they are reached, last part of the steps in which they fall
KNOWN = 4.0  # weight of bytes that must be known; of others where they are random: 0.1
EVERY = 100  # steps between judgements
PIECES = (string.ascii_letters + string.digits + "_ =()\n.").encode()


def copies(rng: random.Random, length: int, held_out: bool) -> Sample:
    """Random strings, each two to four times in a row; what must be known is every repetition but its first bytes."""
    text, known = b"", []
    while len(text) < length:
        piece = bytes(rng.choices(PIECES, k=rng.randint(5, max(8, length // 3))))
        for repetition in range(rng.randint(2, 4)):
            if repetition:
                known.append((len(text) + 2, len(text) + len(piece)))
            text += piece
    return text[:length], [(first, min(last, length)) for first, last in known if first < length]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps. Source: Jordan et al. 2024, kellerjordan.github.io."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                change = self._orthogonal(matrix.grad.lerp(mean, group["momentum"]))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["decay"])
                matrix.add_(change, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    @staticmethod
    def _orthogonal(x: Tensor) -> Tensor:
        x, turned = x / (x.norm() + 1e-7), x.shape[0] > x.shape[1]
        x = x.T if turned else x
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x.T if turned else x


def rate(step: int, done: float) -> float:
    """Share of the learning rate: warmed up, held, then falling to a twentieth."""
    fall = max(0.0, (done - (1 - DECAY)) / DECAY)
    return min(1.0, (step + 1) / WARM) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, fall))))


def loss_of(model, task: str, rng: random.Random, length: int) -> torch.Tensor:
    """Mean loss of a step's tokens, in pieces that fit the cache; gradients are added up."""
    rows, total = max(ROWS, TOKENS // length), 0.0
    for _ in range(4):
        ids, known = batch(task, rng, rows // 4, length, False)
        weight = torch.where(known, KNOWN, 0.1 if task in ("recall", "copy") else 1.0)[:, 1:]
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weight)
        loss = (loss * weight).sum() / weight.sum() / 4
        loss.backward()
        total += loss.item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model, log, state = new_model(), asked.out.with_suffix(".log"), asked.out.with_suffix(".checkpoint")
    TASKS["copy"] = copies
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim < 2 or "embed" in name]
    optimizers = {"muon": Muon(matrices, MUON), "adam": torch.optim.AdamW(others, ADAM, (0.9, 0.95), weight_decay=0.0)}
    spent, first = 0.0, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved[name])
        spent, first = saved["spent"], saved["step"]
    means: dict[str, float] = {}
    for step in range(first, asked.steps):
        began, done = time.process_time(), step / asked.steps
        length = [n for at, n in LENGTHS if done >= at][-1]
        optimizers["muon"].param_groups[0]["lr"] = MUON * rate(step, done)
        optimizers["adam"].param_groups[0]["lr"] = ADAM * rate(step, done)
        task = MIX[step % len(MIX)]
        length = max(length, SHORTEST.get(task, 0))
        loss = loss_of(model, task, random.Random(f"{step} train"), length)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        means[task] = 0.9 * means.get(task, loss) + 0.1 * loss
        spent += time.process_time() - began
        if (step + 1) % EVERY == 0 or step + 1 == asked.steps:
            states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            torch.save({"model": model.state_dict(), **states, "spent": spent, "step": step + 1}, state)
            model.eval()
            held_out = judged(model, 4)
            model.train()
            line = (
                f"{spent / 60:5.1f} CPU minutes, step {step + 1:5d}, length {length:4d}: "
                + ", ".join(f"{task} {loss:.3f}" for task, loss in means.items())
                + "; held out "
                + ", ".join(f"{task} {value:.4f}" for task, value in held_out.items())
            )
            print(line, flush=True)
            with log.open("a") as file:
                file.write(line + "\n")
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, asked.out)


if __name__ == "__main__":
    main()
