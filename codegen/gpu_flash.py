"""Launch the flash kernels: widths, layouts, block lists, gradients of captured tensors and of sinks.

Runs as it is on CPU tensors under Triton's interpreter, eagerly on a GPU, and traced (make_fx, AOTAutograd, Inductor)
under symbolic lengths: nothing here depends on data.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691, section 3 (what the backward keeps: out and log-sum-exp).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnc.codegen import holes
from attnc.codegen.derivative import lookup_slopes
from attnc.codegen.float8 import multiplies, target_of, unread, wide_type
from attnc.codegen.gpu_tables import BlockLists, block_lists
from attnc.codegen.launch import launch, strides
from attnc.codegen.tiles import blocks, classify
from attnc.codegen.triton_text import Slot
from attnc.errors import UsageError
from attnc.expr import Expr
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule

SKIPS = ("range", "table")
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """Tile and resources of one kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class FlashKnobs:
    """Schedule of the three kernels: forward, dq (dq_) and dk with dv (dkv_).

    skip:      how tiles are skipped, by ranges of the mask's bounds or by tables of exact classes.
    section:   heads that run side by side, block after block.
    xcds:      dies with a cache of their own over which programs are spread (MI300X: 8); 1 on NVIDIA.
    precision: of float32 products, "ieee" or "tf32".
    dot8: queries and keys of one type of 8 bits are multiplied as they are, not widened first.
    """

    block_m: int = 128
    block_n: int = 64
    warps: int = 4
    stages: int = 3
    dq_block_m: int = 64
    dq_block_n: int = 64
    dq_warps: int = 4
    dq_stages: int = 2
    dkv_block_m: int = 64
    dkv_block_n: int = 64
    dkv_warps: int = 4
    dkv_stages: int = 2
    skip: str = "range"
    section: int = 1
    xcds: int = 1
    precision: str = "ieee"
    dot8: bool = False

    @property
    def forward(self) -> Launch:
        return Launch(self.block_m, self.block_n, self.warps, self.stages)

    @property
    def dq(self) -> Launch:
        return Launch(self.dq_block_m, self.dq_block_n, self.dq_warps, self.dq_stages)

    @property
    def dkv(self) -> Launch:
        return Launch(self.dkv_block_m, self.dkv_block_n, self.dkv_warps, self.dkv_stages)


def widths(width: int, least: int = 16) -> tuple[int, int]:
    """A head width as a power of two and a tail that is one or 0: 192 = 128 + 64, 80 = 64 + 16, 72 in 64 + 16."""
    whole = max(least, 1 << (width - 1).bit_length())
    half = whole // 2
    tail = max(least, 1 << (width - half - 1).bit_length()) if half >= least else whole
    return (whole, 0) if half + tail >= whole else (half, tail)


def plain_scale(rule: AttentionRule) -> float:
    """The positive factor, where the score is nothing but `factor * s`; else 0, and the hole `score` says."""
    scale = holes.plain_scale(rule)
    return scale if 0 < scale < math.inf else 0.0


def empty_out(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten out and lse. out lies in memory as query does; a query of 8 bits gives bfloat16."""
    B, Hq, L, _ = query.shape
    dtype = wide_type(query.dtype)
    lse = query.new_empty(B, Hq, L, dtype=torch.float32)
    if statically_known_true(query.stride(1) < query.stride(2)):
        return query.new_empty(B, L, Hq, value.shape[3], dtype=dtype).transpose(1, 2), lse
    return query.new_empty(B, Hq, L, value.shape[3], dtype=dtype), lse


def check_types(*operands: Tensor) -> None:
    """Raises: UsageError for operands of 8 bits that kernels do not read on the GPU they lie on."""
    target = target_of(operands[0].device)
    why = None if target is None else unread((t.dtype for t in operands), target)
    if why is not None:
        raise UsageError(f"attend by a generated kernel: {why}. Widen them first, as in key.to(torch.bfloat16).")


def forward(kernels: ModuleType, x: Operands, knobs: FlashKnobs) -> tuple[Tensor, Tensor]:
    """out and lse by the kernels rendered for the rule.

    Shapes: as `Operands` -> out (B, Hq, L, Ev), lse (B, Hq, L) float32.
    """
    check_types(x.query, x.key, x.value)
    out, lse = empty_out(x.query, x.value)
    tile = knobs.forward
    given = _shared(x, knobs, tile, _lists(x, knobs, tile)) | {"p_out": out, "p_lse": lse, **strides("o", out)}
    B, Hq, L, _ = x.query.shape
    _run(kernels.flash_forward, blocks(L, tile.block_m) * B * Hq, given, tile, x)
    return out, lse


def backward(
    kernels: ModuleType,
    x: Operands,
    knobs: FlashKnobs,
    attended: tuple[Tensor, Tensor],
    grad_out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and of the captured tensors that `needs` names, in their order and dtypes.

    attended: what `forward` gave.
    """
    out, lse = attended
    delta = (grad_out.float() * out.float()).sum(-1)
    lse2 = torch.where(lse == -torch.inf, torch.inf, lse * LOG2E)  # no key: every weight is exp2(-inf)
    buffers = {n: torch.zeros_like(t, dtype=torch.float32, memory_format=torch.contiguous_format)
               for n, (t, need) in enumerate(zip(x.captured, needs, strict=True)) if need}  # fmt: skip
    dq, dk, dv = (torch.empty_like(t) for t in (x.query, x.key, x.value))
    (B, Hq, L, _), (_, H, S, _) = x.query.shape, x.key.shape
    known = {"p_do": grad_out, "p_lse": lse2, "p_delta": delta, **strides("o", grad_out)}

    tile = knobs.dq
    given = known | _shared(x, knobs, tile, _lists(x, knobs, tile), buffers) | {"p_dq": dq, **strides("d", dq)}
    _run(kernels.flash_dq, blocks(L, tile.block_m) * B * Hq, given, tile, x, buffers)

    tile = knobs.dkv
    given = known | _shared(x, knobs, tile, _lists(x, knobs, tile, by_keys=True))
    given |= {"p_dk": dk, "p_dv": dv, **strides("dk", dk), **strides("dv", dv)}
    _run(kernels.flash_dkv, blocks(S, tile.block_n) * B * H, given, tile, x)

    if x.rule.sink is not None:
        add_sink_grads(x, x.rule.sink, buffers, delta, lse)
    return [dq, dk, dv, *(buffer.to(x.captured[n].dtype) for n, buffer in buffers.items())]


def _lists(x: Operands, knobs: FlashKnobs, tile: Launch, *, by_keys: bool = False) -> BlockLists | None:
    if knobs.skip == "range":
        return None
    (B, Hq, L, _), S = x.query.shape, x.key.shape[2]
    tiles = classify(x.rule.keep, L, S, tile.block_m, tile.block_n, B=B, Hq=Hq, captured=x.captured, sizes=x.sizes,
                     device=x.query.device)  # fmt: skip
    return block_lists(tiles, L, S, by_keys=by_keys)


def constants_of(
    rule: AttentionRule,
    group: int,
    E: int,
    Ev: int,
    knobs: FlashKnobs,
    tile: Launch,
    *,
    dot8: bool = False,
    learns: Iterable[int] = (),
) -> dict[str, Any]:
    """The compile-time arguments of each kernel.

    dot8: whether queries and keys have one type of 8 bits. learns: captured tensors that have gradients.
    """
    least = 32 if knobs.dot8 and dot8 else 16
    (e_main, e_tail), (ev_main, ev_tail) = widths(E, least), widths(Ev, least)
    return {
        "GROUP": group,
        "E": E,
        "E_MAIN": e_main,
        "E_TAIL": e_tail,
        "EV": Ev,
        "EV_MAIN": ev_main,
        "EV_TAIL": ev_tail,
        "SCALE": plain_scale(rule),
        "PRECISION": knobs.precision,
        "TABLE": knobs.skip == "table",
        "SECTION": knobs.section,
        "XCDS": knobs.xcds,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "DOT8": knobs.dot8 and dot8,
        "SWEEPS": sweeps_of(rule, learns),
    }


def sweeps_of(rule: AttentionRule, learns: Iterable[int]) -> int:
    """Passes of dq over its tiles. A gradient of what a score reads sums the errors of its rows, so those rows find
    delta anew: from the rounded out it is so far off that the slopes of ALiBi were 2.5 times eager's error off."""
    return 2 if {e.args[0] for e in rule.score.walk() if e.op == "load"}.intersection(learns) else 1


def _shared(
    x: Operands, knobs: FlashKnobs, tile: Launch, lists: BlockLists | None, learns: Iterable[int] = ()
) -> dict[str, Any]:
    """Arguments that all kernels have."""
    query, key, value, *_ = x
    E, Ev, group = int(query.shape[3]), int(value.shape[3]), int(x.group)
    rows_b, rows_h = (0, 0) if lists is None else lists.strides
    return {
        "p_q": query,
        "p_k": key,
        "p_v": value,
        "p_list": None if lists is None else lists.order,
        "p_counts": None if lists is None else lists.counts,
        **strides("q", query),
        **strides("k", key),
        **strides("v", value),
        "rows_b": rows_b,
        "rows_h": rows_h,
        "Hq": query.shape[1],
        "L": query.shape[2],
        "S": key.shape[2],
        **constants_of(x.rule, group, E, Ev, knobs, tile, dot8=multiplies(query.dtype, key.dtype), learns=learns),
    }


def _run(
    kernel: Any,
    programs: Any,
    given: dict[str, Any],
    tile: Launch,
    x: Operands,
    buffers: dict[int, Tensor] | None = None,
) -> None:
    launch(kernel, programs, given, x.captured, x.sizes, buffers, num_warps=tile.warps, num_stages=tile.stages)


def _held(index: Tensor, length: int) -> Tensor:
    """Positions inside a table; negative ones count from its end."""
    return torch.where(index < 0, index + length, index).clamp(0, length - 1)


def add_sink_grads(x: Operands, sink: Expr, buffers: dict[int, Tensor], delta: Tensor, lse: Tensor) -> None:
    """d loss / d sink_i = -exp(sink_i - lse_i) delta_i, handed on to what the sink was looked up from."""
    slots = [Slot(t.dtype, t.dim(), n in buffers) for n, t in enumerate(x.captured)]
    slopes = lookup_slopes(sink, slots)
    if not slopes:
        return

    def over_rows(e: Expr) -> Tensor:
        value = torch.as_tensor(x.read(e), device=lse.device)
        return value[..., 0] if value.dim() == 4 else value

    share = torch.where(lse == -torch.inf, 0.0, (over_rows(sink).float() - lse).exp())
    d_sink = -(share * delta)
    for load, slope in slopes:
        table, used = buffers[load.args[0]], {name for e in load.args[1:] for name in e.names()}
        over = [d for d, name in enumerate("bhi") if name not in used]
        given = (d_sink * over_rows(slope).float()).expand(lse.shape)
        given = given.sum(over, keepdim=True) if over else given
        at = [_held(over_rows(e), table.shape[d]).expand(given.shape) for d, e in enumerate(load.args[1:])]
        if at:
            table.index_put_(tuple(at), given, accumulate=True)
        else:
            table.add_(given.sum())
