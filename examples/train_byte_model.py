"""Train the small language model of bytes of `byte_model.py`, on which approximations can be judged.

    python examples/train_byte_model.py [--steps 3000] [--out examples/byte_model.safetensors] [--threads 2]

Lengths grow from 128 to 1,024 bytes: short ones first, which teach to look back, then long ones, which teach to look
far. Every 100 steps it judges itself, writes a line to the log beside the weights, and saves a checkpoint, from which
the same command goes on after an interruption. 3,000 steps are 25 million bytes.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from byte_model import CONTEXT, WEIGHTS, batch, judged, new_model
from safetensors.torch import save_file
from torch.nn import functional as F

TOKENS = 8192  # of a step
LENGTHS = ((0.0, 128), (0.15, 256), (0.35, 512), (0.6, CONTEXT))  # from this part of the steps on
MIX = ("text", "recall", "needle", "text")  # batches in turn
RATE, WARM, DECAY = 2e-3, 100, 0.4  # learning rate, steps until it is reached, last part of the steps in which it falls
KNOWN = 4.0  # weight of bytes that must be known; of others in recall, which are random: 0.1
EVERY = 100  # steps between judgements


def rate(step: int, done: float) -> float:
    """Learning rate: warmed up, held, then falling to a twentieth."""
    fall = max(0.0, (done - (1 - DECAY)) / DECAY)
    return RATE * min(1.0, (step + 1) / WARM) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, fall))))


def loss_of(model, task: str, rng: random.Random, length: int) -> torch.Tensor:
    """Mean loss of a step's tokens, in pieces that fit the cache; gradients are added up."""
    rows, total = TOKENS // length, 0.0
    for _ in range(4):
        ids, known = batch(task, rng, rows // 4, length, False)
        weight = torch.where(known, KNOWN, 0.1 if task == "recall" else 1.0)[:, 1:]
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weight)
        loss = (loss * weight).sum() / weight.sum() / 4
        loss.backward()
        total += loss.item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model, log, state = new_model(), asked.out.with_suffix(".log"), asked.out.with_suffix(".checkpoint")
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    spent, first = 0.0, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        spent, first = saved["spent"], saved["step"]
    means: dict[str, float] = {}
    for step in range(first, asked.steps):
        began, done = time.process_time(), step / asked.steps
        length = [n for at, n in LENGTHS if done >= at][-1]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, done)
        task = MIX[step % len(MIX)]
        loss = loss_of(model, task, random.Random(f"{step} train"), length)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        means[task] = 0.9 * means.get(task, loss) + 0.1 * loss
        spent += time.process_time() - began
        if (step + 1) % EVERY == 0 or step + 1 == asked.steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "spent": spent, "step": step + 1}
            torch.save(saved, state)
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
