"""Launch the kernels of recurrences that no matrix product computes: a scan of each element of the state.

    scan(kernels, given, rule, knobs)                                         -> (out, final_state)
    gradients(kernels, given, needs, (grad_out, grad_state), rule, knobs)     -> the gradients that `needs` names

Shapes: as `attnc::recurrence`; out laid out as (B, L, H, V), gradients as their operands.

What the kernels do not know is done around them, differentiably: a normaliser is what the same recurrence gives for
a column of ones; an exponential gate is a decay f_t + m_{t-1} - m_t and a gate exp(beta_t - m_t) under its running
maximum m (sums in float64); the token's own share under such a gate, read before the update, is added to what was read.

Source: Gu and Dao 2023, arXiv:2312.00752, section 3.3.2; Peng et al. 2023, arXiv:2305.13048 (RWKV-4, maximum).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.cpu_gates import NEVER, divided, running_maximum, starts_of
from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_recurrence import run_kernel
from attnc.codegen.gpu_segments import LEAST, segments_of
from attnc.codegen.gpu_step import KINDS, decay_strides, dense, strides_by
from attnc.codegen.load import kernel_folder, load
from attnc.codegen.render import render, skeleton_text
from attnc.codegen.tiles import blocks
from attnc.errors import LoweringError
from attnc.options import Options
from attnc.rule_recurrence import RecurrenceRule

SKELETON = "recurrence_scan"
KERNELS = ("recurrence_scan", "recurrence_scan_backward")
LARGEST = 16384  # elements of a tile of tokens, channels and states
BY_CHANNEL = 2048  # where a decay of every element is read and written, through shared memory
NARROW = 8  # channels of a block under which sharing a head's key is not worth it
Core = Callable[[Given, RecurrenceRule], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ScanKnobs:
    """block_t: tokens of a tile, block_h: channels (columns of heads) of a program, warps: of the forward."""

    block_t: int = 16
    block_h: int = 32
    warps: int = 4


@lru_cache(maxsize=8)
def kernels_of(device: str, store: str | None = None) -> SimpleNamespace:
    """The loaded kernels by name: the same for all rules, which are constants of a launch."""
    module = load(text_of(device), kernel_folder(store or Options().store))
    return SimpleNamespace(**{name: getattr(module, name) for name in KERNELS})


@lru_cache(maxsize=8)
def text_of(device: str) -> str:
    """The skeleton as a file."""
    return render(skeleton_text(SKELETON), {}, (), spelling=SKELETON, device=device, kernels=KERNELS)


def refuse(rule: RecurrenceRule, K: int) -> str | None:
    """Why the kernels do not compute a rule, as one sentence, or None."""
    decayed = rule.decay in ("channel", "state") or rule.factors
    found = [
        (rule.memory != "state", "taps, which are a convolution"),
        (rule.delta or rule.low_rank, "a transition of low rank, which mixes the elements"),
        (rule.gate == "exp" and decayed, "an exponential gate under a decay by channel, by state or as factors"),
        (rule.state != "float32", f"a state of {rule.state}, allowed is float32"),
        (K > LARGEST // 64, f"a state of {K} rows, allowed are {LARGEST // 64}"),
    ]
    reasons = [why for holds, why in found if holds]
    return f"scan kernels of {rule.name}: found {reasons[0]}. Use the scan in plain torch instead." if reasons else None


def scan(kernels: Any, given: Given, rule: RecurrenceRule, knobs: ScanKnobs) -> tuple[Tensor, Tensor]:
    """Outputs and last state. Raises: LoweringError for what `refuse` refuses."""
    _check(given, rule)
    if is_plain(rule):
        return forward(kernels, given, rule, knobs)[:2]
    with torch.no_grad():
        found, last = _around(given, rule, lambda x, plain: forward(kernels, x, plain, knobs)[:2])
    return _new_out(given, rule).copy_(found), last.contiguous()


def gradients(
    kernels: Any,
    given: Given,
    needs: list[bool],
    grads: tuple[Tensor, Tensor],
    rule: RecurrenceRule,
    knobs: ScanKnobs,
) -> list[Tensor]:
    """Gradients of the operands that `needs` names, in their order; autograd must be on unless the rule is plain."""
    _check(given, rule)
    wanted = [name for name, need in zip(Given._fields, needs, strict=True) if need]
    if is_plain(rule):
        states = forward(kernels, given, rule, knobs, read=False)[2]
        found = backward(kernels, given, states, grads, rule, knobs)
        return [getattr(found, name) for name in wanted]
    operands: list[Any] = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(given, needs, strict=True)]
    own = Given(*operands)
    out, last = _around(own, rule, lambda x, plain: _Scan.apply(kernels, plain, knobs, *x))
    learned = [getattr(own, name) for name in wanted]
    ends = [(y, g) for y, g in ((out, grads[0].to(out.dtype)), (last, grads[1])) if y.requires_grad]
    slopes = torch.autograd.grad([y for y, _ in ends], learned, [g for _, g in ends], allow_unused=True)
    pairs = zip(learned, slopes, strict=True)
    return [torch.zeros_like(x) if g is None else torch.empty_like(x).copy_(g) for x, g in pairs]


class _Scan(torch.autograd.Function):
    """The kernels as a differentiable function of the operands."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, rule: RecurrenceRule, knobs: ScanKnobs, *given: Any) -> tuple[Tensor, Tensor]:
        out, last, states = forward(kernels, Given(*given), rule, knobs, keep=True)
        ctx.bound = kernels, rule, knobs
        ctx.save_for_backward(*given, states)
        return out, last

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
        kernels, rule, knobs = ctx.bound
        *given, states = ctx.saved_tensors
        return None, None, None, *backward(kernels, Given(*given), states, (grad_out, grad_state), rule, knobs)


def _check(given: Given, rule: RecurrenceRule) -> None:
    why = refuse(rule, _keys(given))
    if why is not None:
        raise LoweringError(why)


# Around the kernels.


def is_plain(rule: RecurrenceRule) -> bool:
    """Whether the kernels do all of a rule."""
    return rule.normaliser == "none" and rule.gate != "exp" and rule.qk_norm is None


def _around(x: Given, rule: RecurrenceRule, core: Core) -> tuple[Tensor, Tensor]:
    """The rule from `core`, which knows no normaliser, exponential gate or norm of queries and keys; float32."""
    plain = replace(rule, normaliser="none", qk_norm=None, out="state")
    V, before, m = x.value.shape[3], None, None
    if rule.qk_norm is not None:
        x = x._replace(query=_normed(x.query, rule.qk_norm), key=_normed(x.key, rule.qk_norm))
    if rule.normaliser != "none":
        x = x._replace(value=torch.nn.functional.pad(x.value, (0, 1), value=1.0))
    inner = x
    if rule.gate == "exp":
        before, m, decay, beta = _held_down(x, rule)
        plain = replace(plain, gate="write", decay="token")
        inner = x._replace(decay=decay, beta=beta, bonus=None)
    if x.initial is not None:
        inner = inner._replace(initial=x.initial[..., : V + (rule.normaliser != "none")])
    out, last = core(inner, plain)
    if m is not None:
        ends = m[:, :, -1:, None].expand(*last.shape[:3], 1)
        if rule.read == "before":
            out, m = _with_own(out, x, before, rule)
        last = torch.cat([last, ends.float()], -1)
    return out if rule.normaliser == "none" else divided(out, None if m is None else m.float()[..., None], rule), last


def _normed(x: Tensor | None, eps: float) -> Tensor | None:
    return None if x is None else x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + eps)


def _held_down(x: Given, rule: RecurrenceRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m_{t-1} and m_t in float64, decay and gate under them in float32, all (B, H, L)."""
    assert x.beta is not None
    B, H, L, _ = x.value.shape
    f = torch.zeros_like(x.beta) if x.decay is None else x.decay.view(1, H, 1) if rule.decay == "head" else x.decay
    f, gate = f.double().clamp(min=LEAST).expand(B, H, L), x.beta.double()
    fresh = 0.0 if rule.normaliser == "max1" else NEVER
    start = gate.new_full((B, H), fresh) if x.initial is None else x.initial[..., 0, -1].double().expand(B, H)
    starts = None if x.documents is None else starts_of(x.documents)
    m, before = running_maximum(f, gate, start, fresh, starts)
    return before, m, (f + before - m).float(), torch.exp(gate - m).float()


def _with_own(out: Tensor, x: Given, before: Tensor | None, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """What was read before the update together with the token's own share, and the maximum of both."""
    assert before is not None and x.beta is not None
    own = x.beta.double() if x.bonus is None else x.beta.double() + x.bonus.double().view(1, -1, 1)
    top = torch.maximum(before, own)
    share = x.value.float() * rule.scale
    pair = [t.repeat_interleave(out.shape[1] // t.shape[1], 1).float() for t in (x.query, x.key) if t is not None]
    if pair:
        share = share * (pair[0] * pair[-1] if len(pair) == 2 else pair[0]).sum(-1, keepdim=True)
    return out * torch.exp(before - top).float()[..., None] + share * torch.exp(own - top).float()[..., None], top


# The kernels.


def forward(
    kernels: Any, x: Given, rule: RecurrenceRule, knobs: ScanKnobs, *, read: bool = True, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last state and the states that blocks begin with. Without `read` only the last, with `keep` all three.

    What was not asked for comes back as memory nobody wrote, of no size but for out and the last state.
    """
    (B, H, L, V), constants = x.value.shape, constants_of(rule, x, knobs)
    K, keep = constants["K"], keep or not read
    steps = blocks(L + (rule.read == "before"), knobs.block_t)
    out, last = _new_out(x, rule), x.value.new_empty(B, H, K, V, dtype=torch.float32)
    states = x.value.new_empty(B, steps if keep else 0, K, H * V, dtype=torch.float32)
    initial = None if x.initial is None else x.initial.expand(B, H, K, V)
    given = pointers(x, rule) | constants | {
        "p_initial": initial, "p_out": out, "p_final": last, "p_states": states if keep else None, "READ": read,
        "KEEP": keep, **strides_by("o", "bhle", out), **strides_by("i", "bhkv", initial),
    }  # fmt: skip
    run_kernel(kernels.recurrence_scan, B * blocks(H * V, constants["BLOCK_H"]), given, knobs.warps, 1)
    return out, last, states


def backward(
    kernels: Any, x: Given, states: Tensor, grads: tuple[Tensor, Tensor], rule: RecurrenceRule, knobs: ScanKnobs
) -> Given:
    """Gradients of all operands that are given, laid out as they are."""
    (B, H, L, V), constants = x.value.shape, constants_of(rule, x, knobs)
    (grad_out, grad_state), K, count = grads, constants["K"], blocks(H * V, constants["BLOCK_H"])
    columns = count if constants["SHARED"] else H * V
    new, by_channel = x.value.new_empty, rule.decay == "channel"
    rows = [None if t is None else new(B, L, columns, K, dtype=torch.float32) for t in (x.query, x.key)]
    value = torch.empty_like(x.value)
    decay = None if x.decay is None or rule.decay == "head" else _by_column(x.decay, V, K if by_channel else 0)
    beta = None if x.beta is None else _by_column(x.beta, V, 0)
    once = new(B, K, H, V, dtype=torch.float32) if rule.decay in ("head", "state") else None
    bonus = None if x.bonus is None else new(B, K, H, V, dtype=torch.float32)
    initial = None if x.initial is None else new(B, H, K, V, dtype=torch.float32)
    given = pointers(x, rule) | constants | {
        "p_states": states, "p_do": grad_out, "p_dfinal": grad_state.float().contiguous(), "p_dq": rows[0],
        "p_dk": rows[1], "p_dv": value, "p_dg": decay, "p_drates": once, "p_dw": beta, "p_dbonus": bonus,
        "p_dinitial": initial, **strides_by("o", "bhle", grad_out), **strides_by("dv", "bhle", value),
        "dg_k": 0, **strides_by("dg", "bhlek" if by_channel else "bhle", decay), **strides_by("dw", "bhle", beta),
    }  # fmt: skip
    run_kernel(kernels.recurrence_scan_backward, B * count, given, backward_warps(K, knobs), 1)
    summed = {name: None if t is None else t.sum((0, 3)).T for name, t in (("once", once), ("bonus", bonus))}
    if rule.decay == "head":
        decay, summed["once"] = summed["once"].sum(-1), None  # type: ignore[union-attr]
    elif decay is not None:
        decay = decay.sum(3) if V > 1 else decay.squeeze(3)
    query, key = (_of_heads(row, t) for row, t in ((rows[0], x.query), (rows[1], x.key)))
    found = Given(
        query, key, value, decay, summed["once"], beta if beta is None else beta.sum(3) if V > 1 else beta.squeeze(3),
        summed["bonus"], None if initial is None or x.initial is None else initial.sum_to_size(x.initial.shape),
    )  # fmt: skip
    laid: list[Any] = [g if g is None or t is None else _laid_out(g, t) for g, t in zip(found, x, strict=True)]
    return Given(*laid)


def _of_heads(row: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Sums over the channels of each head of query or key."""
    return None if row is None or x is None else row.unflatten(2, (x.shape[1], -1)).sum(3).transpose(1, 2)


def _laid_out(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x` in its type and strides."""
    if grad.dtype == x.dtype and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad)


def _by_column(x: Tensor, V: int, K: int) -> Tensor:
    """Room for a gradient (B, H, L, V), or (B, H, L, V, K), of `x` (B, H, L) or (B, H, L, K): its own where V is 1."""
    if V == 1:
        return torch.empty_like(x).unsqueeze(3)
    B, H, L = x.shape[:3]
    wide = x.new_empty((B, L, H, V, K) if K else (B, L, H, V), dtype=torch.float32)
    return wide.transpose(1, 2)


def pointers(x: Given, rule: RecurrenceRule) -> dict[str, Any]:
    """The operands and strides that both kernels take."""
    segments = None if x.documents is None else segments_of(x.documents)
    return {
        "p_q": x.query, "p_k": x.key, "p_v": x.value, "p_decay": x.decay, "p_rates": dense(x.rates), "p_beta": x.beta,
        "p_bonus": dense(x.bonus), "p_segments": segments, **strides_by("q", "bhle", x.query),
        **strides_by("k", "bhle", x.key), **strides_by("v", "bhle", x.value), **decay_strides(x, rule),
        **strides_by("w", "bhl", x.beta), "H": x.value.shape[1], "L": x.value.shape[2],
    }  # fmt: skip


def constants_of(rule: RecurrenceRule, x: Given, knobs: ScanKnobs) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    _, H, _, V = x.value.shape
    shared = [t.shape[1] for t in (x.query, x.key) if t is not None]
    return {
        **kinds_of(rule, query=x.query is not None, key=x.key is not None, bonus=x.bonus is not None),
        **sizes_of(H, shared[0] if shared else 0, _keys(x), V, knobs, rule.decay),
        "PACKED": x.documents is not None,
        "INITIAL": x.initial is not None,
    }


def backward_warps(K: int, knobs: ScanKnobs) -> int:
    """Twice as many as of the forward, which holds half as much, where rows of the state fill them."""
    return 2 * knobs.warps if 2 * knobs.warps <= K else knobs.warps


def kinds_of(rule: RecurrenceRule, *, query: bool, key: bool, bonus: bool) -> dict[str, Any]:
    """What a rule is to the kernels."""
    return {
        "SCALE": rule.scale,
        "QUERY": query,
        "KEY": key,
        "KIND": KINDS[rule.decay],
        "FACTORS": rule.factors,
        "GATED": rule.gate == "write",
        "BEFORE": rule.read == "before",
        "BONUS": bonus,
    }


def sizes_of(H: int, Hk: int, K: int, V: int, knobs: ScanKnobs, decay: str = "state") -> dict[str, Any]:
    """Tiles. Blocks of channels stay within a head of keys where that leaves them wide enough."""
    largest = BY_CHANNEL if decay == "channel" and K > 1 else LARGEST
    block_k, group = 1 << (K - 1).bit_length(), H // Hk if Hk else H
    block_h = max(1, min(knobs.block_h, 1 << (H * V - 1).bit_length(), largest // (block_k * knobs.block_t)))
    whole = (group * V) & -(group * V)  # the largest power of two in it
    if Hk > 1 and whole >= min(NARROW, block_h):
        block_h = min(block_h, whole)
    shared = Hk == 1 or (Hk > 1 and (group * V) % block_h == 0)
    return {"GROUP": group, "SHARED": shared, "K": K, "V": V,
            "BLOCK_T": knobs.block_t, "BLOCK_H": block_h, "BLOCK_K": block_k}  # fmt: skip


def _keys(x: Given) -> int:
    return next((t.shape[3] for t in (x.key, x.query) if t is not None), 1)


def _new_out(x: Given, rule: RecurrenceRule) -> Tensor:
    B, H, L, V = x.value.shape
    return x.value.new_empty(B, L, H, V, dtype=x.value.dtype if rule.out == "value" else torch.float32).transpose(1, 2)
