"""A small language model of bytes, and what it is trained and judged on: text, recall and needles.

The model is a Llama (transformers) of 2.7 million parameters: 4 layers, 8 query heads on 2 key heads of 32, RoPE. Four
heads of its first layer begin as looks at the last four bytes, by their biases alone: recall is learnt from such heads,
and finding them takes longer than a short training lasts.
Its text is what every Python carries: the sources and help texts of the standard library. Two synthetic tasks need
attention over long distances:

    recall   b"qx=41 ab=07 qx=41 ..."             pairs of random keys and values; a key that came before has its value
    needle   text with b"# The key of abcd is 4071." hidden in it; at the end the same lines are asked for again

    python examples/byte_model.py [weights.safetensors]        its loss on text, recall and needle accuracy
"""

from __future__ import annotations

import random
import string
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    sys.exit('This example needs transformers and safetensors: pip install "attnc[models]" safetensors')

WEIGHTS = Path(__file__).parent / "byte_model.safetensors"
CONTEXT = 1024
HEAD_DIM, THETA = 32, 10000.0
HELD_OUT = 20  # each such file of the standard library is not trained on
KEYS = 96  # different keys of a recall sequence of CONTEXT bytes, at most: each is asked for more than once
NEEDLES = 6
ASKED = b"\n# The key of %s is %s."

Sample = tuple[bytes, list[tuple[int, int]]]  # a text, and first and last + 1 byte of what must be known in it


def new_model(seed: int = 0, context: int = CONTEXT) -> LlamaForCausalLM:
    """The model with fresh weights."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=HEAD_DIM, max_position_embeddings=max(context, CONTEXT), rope_theta=THETA,
            attention_bias=True, initializer_range=1 / 16, tie_word_embeddings=True, use_cache=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    _look_back(model.model.layers[0].self_attn)
    return model


@torch.no_grad()
def _look_back(attention: torch.nn.Module, heads: int = 4, strength: float = 8.0, frequencies: int = 5) -> None:
    """Heads 0 to 3, which share one head of keys, attend 1 to 4 bytes back: their q is k turned by as many places.

    Only the fastest rotations tell neighbours apart; five of them do so up to 1,024 places without a second peak.
    """
    angles = torch.outer(torch.arange(1, heads + 1), THETA ** (-2 * torch.arange(frequencies) / HEAD_DIM))
    attention.k_proj.bias[:frequencies] = strength
    query = attention.q_proj.bias.view(-1, 2, HEAD_DIM // 2)[:heads, :, :frequencies]
    query.copy_(strength * torch.stack([angles.cos(), -angles.sin()], 1))


def trained_model(path: Path = WEIGHTS) -> LlamaForCausalLM:
    """The model as trained, in float32 and evaluation mode."""
    if not path.exists():
        sys.exit(f"{path}: no weights there. Train them: python examples/train_byte_model.py --out {path}")
    model = new_model()
    missing, unknown = model.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    if unknown or missing not in ([], ["lm_head.weight"]):  # the head is the embedding
        raise ValueError(f"{path}: weights missing {missing}, unknown {unknown}")
    return model.eval()


# Texts.


@cache
def texts(held_out: bool) -> bytes:
    """The standard library's sources and help texts, those for training or those kept for judging."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(p.parts)]
    return b"\n\n".join(p.read_bytes() for n, p in enumerate(files) if (n % HELD_OUT == 0) == held_out)


def plain(rng: random.Random, length: int, held_out: bool) -> Sample:
    """A piece of text, all of which counts."""
    whole = texts(held_out)
    at = rng.randrange(len(whole) - length)
    return whole[at : at + length], []


def recall(rng: random.Random, length: int, held_out: bool) -> Sample:
    """Pairs of keys and values; what must be known are the values of keys that came before."""
    letters = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    keys = rng.sample(letters, rng.randint(2, max(3, KEYS * length // CONTEXT)))
    value = {k: f"{rng.randrange(100):02d}" for k in keys}
    seen: set[str] = set()
    text, known = "", []
    while len(text) < length:
        key = rng.choice(keys)
        text += f"{key}={value[key]} "
        if key in seen:
            known.append((len(text) - 3, len(text) - 1))
        seen.add(key)
    return text[:length].encode(), [(a, b) for a, b in known if b <= length]


def needle(rng: random.Random, length: int, held_out: bool) -> Sample:
    """Text with numbers hidden in it at random depths, which are asked for at its end, in another order."""
    count = rng.randint(1, max(1, NEEDLES * length // CONTEXT))
    names = ["".join(rng.choices(string.ascii_lowercase, k=4)).encode() for _ in range(count)]
    lines = {name: ASKED % (name, b"%04d" % rng.randrange(10000)) for name in names}
    asked = [lines[name] for name in rng.sample(sorted(lines), len(lines))]
    hidden, tail = list(lines.values()), b"".join(asked)
    rest, _ = plain(rng, length - 2 * len(tail), held_out)
    at = sorted(rng.randrange(len(rest) + 1) for _ in hidden)
    parts = [rest[a:b] for a, b in zip([0, *at], [*at, len(rest)], strict=True)]
    text = parts[0] + b"".join(line + part for line, part in zip(hidden, parts[1:], strict=True)) + tail
    ends = [length - len(b"".join(asked[n:])) + len(asked[n]) for n in range(len(asked))]
    return text, [(end - 5, end - 1) for end in ends]


TASKS: dict[str, Callable[[random.Random, int, bool], Sample]] = {"text": plain, "recall": recall, "needle": needle}
JUDGED = tuple(TASKS)  # training adds one more


def batch(task: str, rng: random.Random, rows: int, length: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """Bytes (rows, length) and which of them must be known (rows, length)."""
    found = [TASKS[task](rng, length, held_out) for _ in range(rows)]
    known = torch.zeros(rows, length, dtype=torch.bool)
    for row, (_, spans) in enumerate(found):
        for first, last in spans:
            known[row, first:last] = True
    return torch.tensor([list(text) for text, _ in found]), known


def batches(task: str, count: int, rows: int = 4, length: int = CONTEXT, seed: int = 1) -> Iterator[Tensor]:
    """Inputs of a task, of texts that were not trained on."""
    rng = random.Random(f"{task} {seed}")
    return (batch(task, rng, rows, length, True)[0] for _ in range(count))


# Judging.


@torch.no_grad()
def judged(model: Callable[[Tensor], object], count: int = 8, rows: int = 4, length: int = CONTEXT) -> dict[str, float]:
    """Loss on text in nats per byte; fractions of values and numbers of which every byte is the most likely one."""
    found = {}
    for task in JUDGED:
        rng, total, right = random.Random(f"judged {task}"), 0.0, 0.0
        for _ in range(count):
            ids, known = batch(task, rng, rows, length, True)
            logits = model(ids).logits[:, :-1]
            if task == "text":
                right += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
                total += ids[:, 1:].numel()
                continue
            width = 2 if task == "recall" else 4
            hits = (logits.argmax(-1) == ids[:, 1:])[known[:, 1:]].view(-1, width).all(-1)
            right, total = right + hits.sum().item(), total + len(hits)
        found[task] = right / total
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS
    values = judged(trained_model(path))
    print(f"text {values['text']:.4f} nats per byte, recall {values['recall']:.1%}, needle {values['needle']:.1%}")
