"""Launch the kernels of chunked recurrences, forward: what a rule is to them, and what they leave for the backward.

    forward(kernels, inputs, rule, knobs) -> (out, final_state, saved)

Shapes: query, key (B, Hk, L, K), value (B, H, L, V), a, b (B, H or Hk, L, K), documents (B, L), the rest as the rule
says; out (B, H, L, V) laid out as (B, L, H, V); final_state (B, H, K, V + rule.columns) float32. Any strides.

N chunks of C = knobs.chunk_size tokens; the last may be ragged. `Saved`, contiguous, M the type of products (bfloat16
for bfloat16 inputs, else float32), None where the rule has no use for it:

    decay        the decay that kernels saw: the rule's, or under an exponential gate (B, H, L), <= 0
    beta         the gate that kernels saw: the rule's, or under an exponential gate exp(beta - maximum)
    sums         G, float32: (B, H, L) for decays by token, (B, H, L, K) by channel; inclusive, from the chunk's start,
                 of max(decay, LEAST). By head G = (i + 1) decay, nowhere stored
    norms        (2, B, Hk, L) float32: 1 / |k|, 1 / |q| with qk_norm; kernels take q and k as they were given
    segments     (B, L) int32: number of the document of a token, counted from 0 along the row
    states       (B, H, N, K, V) M: the state each chunk begins with, before any of its decay
    normalisers  (B, H, N, K) float32: the normaliser's column likewise
    inverse      (B, H, L, C) M: row i of T = (I + A_kk)^-1, or (I - A_ab)^-1, of the token's chunk; beta is in A_kk
    scores       (B, H, L, C) M: A_qk with scale, w and norms, for decays by channel and for low rank; else not stored
    keys, reads  (B, H, L, C) M: A_ak with w, A_qb with scale, low rank
    corrected    (B, H, L, V) M: v_new = T beta (v - exp(G) k S) under the delta rule, x for low rank
    maximum      (B, H, L) float32: the running maximum under an exponential gate

Runs as it is on CPU tensors under Triton's interpreter, eagerly on a GPU, and traced: nothing here depends on data.

Source: Yang et al. 2024, arXiv:2406.06484, section 3 (delta rule in chunks); Dao and Gu 2024, arXiv:2405.21060.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_segments import held_down, last_maximum, segments_of
from attnc.codegen.launch import launch, strides
from attnc.codegen.load import kernel_folder, load, triton
from attnc.codegen.render import render, skeleton_text
from attnc.codegen.tiles import blocks
from attnc.errors import LoweringError
from attnc.options import Options
from attnc.rule_recurrence import RecurrenceRule

KERNELS = {
    "chunk_within": ("chunk_sums", "row_norms", "chunk_within"),
    "chunk_state": ("chunk_state",),
    "chunk_output": ("chunk_output",),
}
DECAYS = {"none": 0, "head": 1, "token": 2, "channel": 3}
DELTA, RANK = 1, 2
WIDEST = 256


@dataclass(frozen=True)
class BackwardKnobs:
    """Schedule of the backward kernels beside the forward's chunk size and precision: tiles, warps, stages.

    state_: of chunk_state_backward. output_: of chunk_output_backward. The others: of the two that are left; block_k
    also of chunk_state_backward.
    """

    block_k: int = 64
    block_v: int = 64
    warps: int = 4
    stages: int = 2
    state_block_v: int = 32
    state_warps: int = 4
    state_stages: int = 2
    output_block_k: int = 32
    output_block_v: int = 32
    output_warps: int = 8
    output_stages: int = 2


@dataclass(frozen=True)
class RecurrenceKnobs:
    """Schedule of chunk_within (within_), chunk_state and chunk_output (out_): chunk_size 16, 32, 64 or 128 tokens;
    columns of a tile of keys (block_k also in chunk_output) and of values.

    products: what products of bfloat16 inputs keep between them, their own type ("input") or "float32".
    precision: of products of float32, "ieee", "tf32" or "tf32x3"; T is never made with less than "tf32x3".
    backward: of the gradients; None: as suits the rule.
    """

    chunk_size: int = 64
    block_k: int = 64
    block_v: int = 64
    out_block_v: int = 64
    warps: int = 4
    stages: int = 2
    within_block_k: int = 32
    within_warps: int = 4
    out_warps: int = 4
    out_stages: int = 2
    products: str = "input"
    precision: str = "ieee"
    backward: BackwardKnobs | None = None


class Saved(NamedTuple):
    """What the backward needs; see the module."""

    decay: Tensor | None
    beta: Tensor | None
    sums: Tensor | None
    norms: Tensor | None
    segments: Tensor | None
    states: Tensor
    normalisers: Tensor | None
    inverse: Tensor | None
    scores: Tensor | None
    keys: Tensor | None
    reads: Tensor | None
    corrected: Tensor | None
    maximum: Tensor | None


class Prepared(NamedTuple):
    """Inputs as kernels take them: one dtype of query, key, value, a and b; nothing left that kernels do not know."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None
    initial: Tensor | None
    a: Tensor | None
    b: Tensor | None
    segments: Tensor | None
    maximum: Tensor | None


@lru_cache(maxsize=8)
def kernels_of(device: str, store: str | None = None) -> SimpleNamespace:
    """The loaded kernels by name: the same for all rules, which are constants of a launch.

    store: where they are kept; None: the user's own.
    """
    found: dict[str, Any] = {}
    for skeleton, names in KERNELS.items():
        module = load(text_of(skeleton, device), kernel_folder(store or Options().store))
        found |= {name: getattr(module, name) for name in names}
    return SimpleNamespace(**found)


@lru_cache(maxsize=32)
def text_of(skeleton: str, device: str) -> str:
    """A skeleton's kernels as one file."""
    return render(skeleton_text(skeleton), {}, (), spelling=skeleton, device=device, kernels=KERNELS[skeleton])


def refuse(rule: RecurrenceRule, K: int, V: int, *, query: bool = True) -> str | None:
    """Why kernels do not compute a rule, as one sentence, or None."""
    found = [
        (not query or K == 1, "a state of one row, which is scanned token by token"),
        (rule.memory != "state", "taps, which are a convolution"),
        (rule.factors, "decays as factors, allowed are logarithms"),
        (rule.decay not in DECAYS, f"a decay by {rule.decay}, allowed are {', '.join(DECAYS)}"),
        (rule.state != "float32", f"a state of {rule.state}, allowed is float32"),
        (max(K, V) > WIDEST, f"a state of {K} x {V}, allowed are {WIDEST} x {WIDEST}"),
        (rule.delta and rule.normaliser != "none", "a normaliser under the delta rule"),
        (rule.gate == "exp" and rule.read == "before", "an exponential gate read before the update"),
        (rule.gate == "exp" and rule.decay == "channel", "an exponential gate with a decay by channel"),
    ]
    reasons = [why for holds, why in found if holds]
    if not reasons:
        return None
    return f"chunked GPU kernels of {rule.name}: found {reasons[0]}. Use the chunked form of the CPU path instead."


def forward(
    kernels: Any, inputs: Given, rule: RecurrenceRule, knobs: RecurrenceKnobs
) -> tuple[Tensor, Tensor, Saved]:
    """Outputs, last state and what the backward needs. Raises: LoweringError for what `refuse` refuses."""
    key, value = inputs.key, inputs.value
    K, V = 1 if key is None else key.shape[3], value.shape[3]
    why = refuse(rule, K, V, query=inputs.query is not None and key is not None)
    if why is not None:
        raise LoweringError(why)
    x = prepared(inputs, rule)
    (B, H, L, _), C = value.shape, knobs.chunk_size
    constants = constants_of(rule, x, knobs)
    saved = _empty(x, constants, rule, knobs)
    saved = saved._replace(sums=_sums(kernels, x, knobs), norms=_norms(kernels, x, rule))
    out = value.new_empty(B, L, H, V, dtype=value.dtype if rule.out == "value" else torch.float32).transpose(1, 2)
    last = value.new_empty(B, H, K, V + rule.columns, dtype=torch.float32)
    if x.maximum is not None:
        last[..., -1] = last_maximum(x.maximum, inputs.initial, rule)[..., None]
    given = constants | pointers(x, saved, constants["DECAY"]) | {"p_out": out, "p_final": last, **strides("o", out)}
    N, matrices = blocks(L, C), (constants["SOLVE"] != 0) + constants["STORED"]
    if matrices:
        within = given | {"BLOCK_K": tile_width(K, knobs.within_block_k)}
        run_kernel(kernels.chunk_within, N * B * H * matrices, within, knobs.within_warps, 1)
    run_kernel(kernels.chunk_state, blocks(V, constants["BLOCK_V"]) * B * H, given, knobs.warps, knobs.stages)
    given |= _reading(x, saved, rule, knobs)
    run_kernel(kernels.chunk_output, blocks(V, given["BLOCK_V"]) * N * B * H, given, knobs.out_warps, knobs.out_stages)
    return out, last, saved


def _empty(x: Prepared, constants: dict[str, Any], rule: RecurrenceRule, knobs: RecurrenceKnobs) -> Saved:
    """What is kept, unwritten; sums and norms apart."""
    (B, H, L, V), K, C = x.value.shape, constants["K"], constants["BLOCK_C"]
    N, solve, mid = blocks(L, C), constants["SOLVE"], product_type(x.value.dtype, knobs.products)

    def pairs(wanted: bool) -> Tensor | None:
        return x.value.new_empty(B, H, L, C, dtype=mid) if wanted else None

    return Saved(
        decay=x.decay,
        beta=x.beta,
        sums=None,
        norms=None,
        segments=x.segments,
        states=x.value.new_empty(B, H, N, K, V, dtype=mid),
        normalisers=x.value.new_empty(B, H, N, K, dtype=torch.float32) if rule.normaliser != "none" else None,
        inverse=pairs(solve != 0),
        scores=pairs(constants["STORED"]),
        keys=pairs(solve == RANK),
        reads=pairs(solve == RANK),
        corrected=x.value.new_empty(B, H, L, V, dtype=mid) if solve else None,
        maximum=x.maximum,
    )


# What kernels are given.


def prepared(inputs: Given, rule: RecurrenceRule) -> Prepared:
    """Inputs of one dtype, documents counted, an exponential gate held down by its running maximum."""
    query, key, value, decay, _, beta, bonus, initial, a, b, documents = inputs
    several = [t for t in (query, key, value, a, b) if t is not None]
    dtype = several[0].dtype
    for t in several[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    assert query is not None and key is not None  # as `refuse` says
    a, b = (t if t is None else t.to(dtype) for t in (a, b))
    segments = None if documents is None else segments_of(documents)
    maximum = None
    if rule.gate == "exp":
        assert beta is not None
        decay, beta, maximum = held_down(decay, beta, initial, segments, rule)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return Prepared(query, key, value, decay, beta, bonus, initial, a, b, segments, maximum)


def product_type(dtype: torch.dtype, products: str = "input") -> torch.dtype:
    """Type of states, corrected values and scores between products: float16 would not hold their range."""
    return torch.bfloat16 if dtype == torch.bfloat16 and products == "input" else torch.float32


def tile_width(width: int, block: int) -> int:
    """Columns of a tile: a power of two, at least 16, no wider than the whole."""
    return max(16, min(block, 1 << (width - 1).bit_length()))


def constants_of(rule: RecurrenceRule, x: Prepared, knobs: RecurrenceKnobs) -> dict[str, Any]:
    """The compile-time arguments of all kernels; those of `chunk_output` differ in BLOCK_V and K's decay only."""
    (_, Hk, _, K), H, V = x.key.shape, x.value.shape[1], x.value.shape[3]
    rank = x.a is not None
    return {
        **_groups(x),
        **kinds_of(rule, low_rank=rank, packed=x.segments is not None, bonus=x.bonus is not None),
        "GROUP": int(H // Hk),
        "K": int(K),
        "V": int(V),
        "INITIAL": x.initial is not None,
        **types_of(x.value.dtype, knobs, "hip" if torch.version.hip else "cuda"),
        **sizes_of(K, V, knobs),
    }


def kinds_of(rule: RecurrenceRule, *, low_rank: bool, packed: bool, bonus: bool) -> dict[str, Any]:
    """What a rule is to the kernels."""
    decay = "token" if rule.gate == "exp" else rule.decay
    return {
        "COLUMNS": rule.columns,
        "DECAY": DECAYS[decay],
        "SOLVE": DELTA if rule.delta else RANK if low_rank else 0,
        "RANK": low_rank,
        "GATED": rule.gate != "none",
        "NORMED": rule.qk_norm is not None,
        "PACKED": packed,
        "NORMALISED": rule.normaliser != "none",
        "MAX1": rule.normaliser == "max1",
        "BEFORE": rule.read == "before",
        "BONUS": bonus,
        "STORED": decay == "channel" or low_rank,
        "SCORES": decay == "channel" or low_rank,
        "SCALE": rule.scale,
        "EPS": rule.eps,
    }


def types_of(dtype: torch.dtype, knobs: RecurrenceKnobs, backend: str) -> dict[str, Any]:
    """Types and precisions of products; AMD's matrix units multiply float32 as it is."""
    language = triton().language
    mid = product_type(dtype, knobs.products)
    precision = knobs.precision if dtype == torch.float32 else "tf32"
    return {
        "MID": language.bfloat16 if mid == torch.bfloat16 else language.float32,
        "PRECISION": "ieee" if backend == "hip" else precision,
        "EXACT": "ieee" if backend == "hip" or (knobs.precision == "ieee" and dtype == torch.float32) else "tf32x3",
    }


def sizes_of(K: int, V: int, knobs: RecurrenceKnobs) -> dict[str, int]:
    """Tiles of `chunk_within` and `chunk_state`."""
    return {
        "BLOCK_C": knobs.chunk_size,
        "BLOCK_K": tile_width(K, knobs.block_k),
        "BLOCK_V": tile_width(V, knobs.block_v),
    }


def _groups(x: Prepared) -> dict[str, int]:
    H = x.value.shape[1]
    return {f"GROUP_{name}": 1 if t is None else int(H // t.shape[1]) for name, t in (("A", x.a), ("B", x.b))}


def pointers(x: Prepared, saved: Saved, kind: int) -> dict[str, Any]:
    """Tensors and strides by parameter name; an absent tensor has strides 0."""
    B, H, L, _ = x.value.shape
    given: dict[str, Any] = {"B": B, "H": H, "L": L}
    for name, t in (("q", x.query), ("k", x.key), ("v", x.value), ("a", x.a), ("b", x.b), ("i", x.initial)):
        given[f"p_{'initial' if name == 'i' else name}"] = t
        given |= dict.fromkeys((f"{name}_{axis}" for axis in "bhle"), 0) if t is None else strides(name, t)
    beta = (0, 0, 0) if x.beta is None else x.beta.stride()
    bonus = (0, 0) if x.bonus is None else x.bonus.stride()
    given |= dict(zip(("beta_b", "beta_h", "beta_l", "bonus_h", "bonus_e"), (*beta, *bonus), strict=True))
    given |= {"p_beta": x.beta, "p_bonus": x.bonus, "p_rate": x.decay if DECAYS["head"] == kind else None}
    names = ("sums", "norms", "segments", "states", "normalisers", "inverse", "scores", "keys", "reads", "corrected",
             "maximum")  # fmt: skip
    return given | {f"p_{name}": getattr(saved, name) for name in names}


def _reading(x: Prepared, saved: Saved, rule: RecurrenceRule, knobs: RecurrenceKnobs) -> dict[str, Any]:
    """What `chunk_output` is given otherwise: under the delta rule the corrected values, which hold the gate."""
    given: dict[str, Any] = {"BLOCK_V": tile_width(x.value.shape[3], knobs.out_block_v)}
    if rule.delta:
        assert saved.corrected is not None
        given |= {"p_v": saved.corrected, **strides("v", saved.corrected), "GATED": False}
    return given


def _sums(kernels: Any, x: Prepared, knobs: RecurrenceKnobs) -> Tensor | None:
    if x.decay is None or x.decay.dim() == 1:
        return None
    B, H, L, K = *x.value.shape[:3], x.decay.shape[3] if x.decay.dim() == 4 else 1
    decay = x.decay if x.decay.dim() == 4 else x.decay.unsqueeze(-1)
    sums = torch.empty_like(decay, dtype=torch.float32, memory_format=torch.contiguous_format)
    sizes = {"H": H, "L": L, "K": K, "BLOCK_C": knobs.chunk_size, "BLOCK_K": 1 if K == 1 else tile_width(K, 64)}
    given = {"p_decay": decay, "p_sums": sums, **strides("g", decay), **sizes}
    run_kernel(kernels.chunk_sums, blocks(L, knobs.chunk_size) * B * H, given, 4, 1)
    return sums if x.decay.dim() == 4 else sums.squeeze(-1)


def _norms(kernels: Any, x: Prepared, rule: RecurrenceRule) -> Tensor | None:
    if rule.qk_norm is None:
        return None
    B, Hk, L, K = x.key.shape
    norms = x.key.new_empty(2, B, Hk, L, dtype=torch.float32)
    given = {"p_q": x.query, "p_k": x.key, "p_norms": norms, **strides("q", x.query), **strides("k", x.key)}
    given |= {"B": B, "H": Hk, "L": L, "K": K, "EPS": rule.qk_norm, "BLOCK_C": 64, "BLOCK_K": tile_width(K, 64)}
    run_kernel(kernels.row_norms, blocks(L, 64) * B * Hk, given, 4, 1)
    return norms


def run_kernel(kernel: Any, programs: Any, given: dict[str, Any], warps: int, stages: int) -> None:
    bound = {name: given[name] for name in kernel.arg_names}
    launch(kernel, programs, bound, num_warps=warps, num_stages=stages)
