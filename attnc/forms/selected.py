"""The selected family: softmax attention over keys that are chosen at run time, exact among those that are chosen.

    o_i = sum_{j in I_i, kept} exp(score_ij - lse_i) v_j,   I = choose(queries, keys, rule)

A form of this family is a selector and the way its choice is laid out (`attnc.codegen.key_lists`); score, mask, sink
and the gradient of everything are the rule's and shared. The choice is a constant for gradients. What the rule does not
keep is never attended, chosen or not.

Most forms choose blocks: `chosen` (B, heads, tiles, n) holds, for each tile of `tile_m` query rows, n numbers of blocks
of `block` keys, NONE for none, none twice; heads is Hq, H (one choice for the query heads of a key head) or 1.

Source: Yuan et al. 2025, "Native Sparse Attention", arXiv:2502.11089, section 3; Lu et al. 2025, "MoBA",
arXiv:2502.13189.
Exact:  where the knobs keep every key. An approximation by name elsewhere, taken only where `allow` names it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, KeyLists, listed, near_rows, of_rows, of_tiles
from attnc.codegen.selectors import joined, near_blocks, top_blocks, with_masks_of_scores
from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.roofline import BACKWARD, seconds
from attnc.cost_models.tile_model import FlashWork, TileCount, fits, flash_seconds
from attnc.expr import BOOL, TRUE, B, Expr, H, I, J, const, floordiv, load, terms_of
from attnc.expr_text import parse
from attnc.forms.base import AttentionForm, Form, knob
from attnc.forms.flash import Flash, work_of
from attnc.forms.generated import DTYPES
from attnc.forms.masked import SETTLED, reference, settle_empty
from attnc.forms.narrowed import gpu_here, region_of
from attnc.forms.selected_lists import Layout, best_lists, knobs_of, list_seconds, list_settings, text_of
from attnc.forms.selected_lists import unfit as unwalked
from attnc.operands import Operands
from attnc.predicate import conjunction, distances
from attnc.region import ITEM_BYTES, AttentionRegion

CAUSAL = parse("j <= i")
FEW = 32  # query rows below which each has its own list; from it on, rows are sorted by the blocks that they chose
BAR = " | "
# The choice is a table of the mask: tiles of keys that none of a tile of rows chose are skipped.
ON_GPU = Flash(skip="table")
BEST, TABLE = "best", "table"
TILES = r"\d+x\d+x\d+x\d+"


@dataclass(frozen=True)
class Selected(AttentionForm):
    """A form that chooses keys at run time.

    phases: what it serves, of "prefill", "decode" and "training". chooses_blocks: whether its tiles are the choice and
    no more. kernel: on a GPU the choice as a table of the mask ("table"), or kernels that walk its lists, by the tiles
    of the forward, dq, dk with dv ("128x64x4x2/64x64x4x2/64x64x4x2"); "best": what is predicted faster.
    """

    approximates: ClassVar[bool] = True
    chooses_blocks: ClassVar[bool] = False
    kernel: str = knob(BEST, unit="table, or rows x keys x warps x stages", pattern=f"{TABLE}|{TILES}(/{TILES}){{0,2}}")

    def spell(self) -> str:
        """One line; the kernel only where it is not the best."""
        shown = [f.name for f in fields(self) if f.name != "kernel" or self.kernel != BEST]
        return f"{self.name}{{{','.join(f'{name}={getattr(self, name)}' for name in shown)}}}"

    @abstractmethod
    def choose(self, given: Operands) -> Tensor:
        """The choice, int64, of shape `chosen_shape`; no gradient."""

    def choice_of(self, given: Operands) -> Tensor:
        """The choice among the keys that no mask of the run takes out, be it one that is added to scores."""
        return self.choose(with_masks_of_scores(given))

    @abstractmethod
    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        """Shape of the choice, from the shapes of the operands alone, which may be symbols of a graph: no guards."""

    @abstractmethod
    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        """The tiles of a choice and the operands that they are of.

        No pair of a row and a key is in two tiles, but where the score of those operands takes back what counts it more
        often than it was chosen.

        The operands are `given`, or those of `narrowed` where the tiles hold more keys than were chosen.
        """

    @abstractmethod
    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        """The same attention with the choice as part of the mask, and as a captured tensor; keys may be added."""

    def folded(self, gradient: Tensor, given: Tensor) -> Tensor:
        """The gradient of a key or value, from that of the one that `laid` gives in its place."""
        return gradient

    @abstractmethod
    def pairs(self, region: AttentionRegion) -> float:
        """Pairs of a row and a key that are attended at most, of one query head."""

    @abstractmethod
    def choosing(self, region: AttentionRegion) -> Work:
        """What it takes to choose."""

    @abstractmethod
    def keeps_all(self, region: AttentionRegion) -> bool:
        """Whether these knobs keep every key of `region`."""

    def refuse(self, region: AttentionRegion) -> str | None:
        if reason := self.unserved(region):
            return reason
        return self.unfit(region)

    def unfit(self, region: AttentionRegion) -> str | None:
        """Why this form, beyond what all of the family ask for, cannot compute `region`."""
        return None

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None and region.shape.has_lengths and self.keeps_all(region)

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        heads, pairs = float(s.B * s.Hq), self.pairs(region)
        copied = heads * item * (4 * s.L * (s.E + s.Ev) + 2 * self.gathered(region) * (s.E + s.Ev))
        works = [
            Work("flash", 4.0 * heads * pairs * max(s.E, s.Ev), heads * pairs, float(region.bytes), 8),
            Work("memory", bytes=copied, launches=8),
            self.choosing(region),
        ]
        if region.training:
            more = BACKWARD["flash"]
            works += [Work(w.engine, more * w.flops, more * w.exps, more * w.bytes, 2 * w.launches) for w in works[:2]]
        return Cost(tuple(works))

    @property
    def tile_rows(self) -> int:
        """Query rows that share a list; 1: each row has its own."""
        return 1

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        return self._on_gpu(region, gpu)[0] + seconds(Cost((self.choosing(region),)), gpu, region.dtype)

    def _on_gpu(self, region: AttentionRegion, gpu: Gpu) -> tuple[float, str]:
        """Predicted time of what follows the choice, and the kernel that takes it."""
        if region.dtype not in DTYPES:
            return float("inf"), TABLE
        layout = self._layout(region)
        if self.kernel not in (BEST, TABLE):
            knobs = knobs_of(self.kernel)
            return float("inf") if layout is None else list_seconds(layout, region, gpu, knobs), self.kernel
        whole, tiles = work_of(region, "table"), ON_GPU.tiles
        work = replace(whole, counts=_United(whole, self.pairs(region), self.tile_rows))
        table = flash_seconds(work, tiles, gpu) if fits(work, tiles, gpu) is None else float("inf")
        if layout is None or self.kernel == TABLE:
            return table, TABLE
        found, knobs = best_lists(layout, region, gpu)
        return (found, text_of(knobs, region.training)) if found < table else (table, TABLE)

    def by_length(self, region: AttentionRegion, device: Device) -> Callable[[AttentionRegion], float]:
        layout = self._layout(region) if isinstance(device, Gpu) and self.kernel == BEST else None
        if layout is None or not isinstance(device, Gpu):
            return super().by_length(region, device)
        kernels = TABLE, text_of(best_lists(layout, region, device)[1], region.training)
        times = [replace(self, kernel=kernel).by_length(region, device) for kernel in kernels]
        return lambda other: min(taken(other) for taken in times)

    def _layout(self, region: AttentionRegion) -> Layout | None:
        """The tiles of kernels that walk the lists; None where only a choice that was made says them."""
        if not self.chooses_blocks or not isinstance(self, BlockSelected):
            return None
        s = region.shape
        rows, keys = (torch.empty(shape, device="meta") for shape in ((s.B, s.Hq, s.L, s.E), (s.B, s.H, s.S, s.E)))
        shape = self.chosen_shape(Operands(rows, keys, keys, (), (), region.rule))
        return Layout.of(shape, self.tile_rows, self.block_keys, region)

    def gathered(self, region: AttentionRegion) -> float:
        """Keys written once more beside the products, of one query head."""
        return self.pairs(region) / 256  # each tile of as many rows takes a copy of its block

    def cpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        *tensors, rule = given
        out, lse, _ = torch.ops.attnc.selected(*tensors, f"{self.spell()}{BAR}{rule.spell()}")
        if rule.sink is None and rule.empty in SETTLED:
            out = settle_empty(out, lse != -torch.inf, given)
        return out, lse

    def kept(self, given: Operands) -> Operands:
        with torch.no_grad():
            chosen = self.choice_of(given)
        return self.narrowed(chosen, given)

    def gpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        kernel, gpu, region = self.kernel, gpu_here(), region_of(given)
        if kernel == BEST and not region.shape.is_static and unwalked(region) is None:
            return self.cpu(given)  # one operator: what chooses sees the sizes of the run, and guards none
        if kernel == BEST:
            kernel = TABLE if gpu is None else self._on_gpu(region, gpu)[1]
        if kernel == TABLE:
            return ON_GPU.gpu(self.kept(given))
        return replace(self, kernel=kernel).cpu(given)  # the same operator, which looks where its tensors lie

    def reference(self, given: Operands) -> tuple[Tensor, Tensor]:
        """The formula in float64, every pair in memory."""
        return reference(self.kept(given.double()))

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        """This setting, whose other knobs change results (attnc.budget searches them), then kernels to try for it."""
        if self.refuse(region):
            return ()
        layout = self._layout(region) if isinstance(device, Gpu) and self.kernel == BEST else None
        if layout is None or not isinstance(device, Gpu):
            return (self,)
        kernels = (text_of(knobs, region.training) for knobs in list_settings(layout, region, device))
        return (self, *(replace(self, kernel=kernel) for kernel in (*kernels, TABLE)))


@dataclass(frozen=True)
class BlockSelected(Selected):
    """A form whose choice is blocks of `block_keys` keys for tiles of `tile_rows` query rows."""

    @property
    @abstractmethod
    def block_keys(self) -> int:
        """Keys of a block."""

    @abstractmethod
    def kept_blocks(self, S: int) -> int:
        """Blocks of each list, the forced ones among them, at most."""

    @property
    def always(self) -> tuple[int, int]:
        """Blocks at the start that every row keeps, and blocks before its own; -1: its own neither."""
        return 0, -1

    def choice_heads(self, given: Operands) -> int:
        """Heads that choose: Hq, H or 1."""
        return given.query.shape[1]

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        B, _, L, _ = given.query.shape
        return B, self.choice_heads(given), -(-L // self.tile_rows), self.kept_blocks(given.key.shape[2])

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        B, Hq, L, _ = given.query.shape
        H, S = given.key.shape[1:3]
        shape, width = (B, Hq, H, L), self.block_keys
        blocks, is_causal = -(-S // width), given.rule.keep == CAUSAL and L == S
        if self.tile_rows > 1:
            return given, of_tiles(chosen, shape, self.tile_rows, width, "causal" if is_causal else "rule")
        if L < FEW:
            return given, [listed(chosen, shape, 1, width)]
        first, near = self.always
        if not is_causal or near < 0:
            return given, of_rows(chosen, shape, blocks, width, "causal" if is_causal else "rule")
        own = torch.arange(L, device=chosen.device).unsqueeze(-1) // width
        rest = torch.where((chosen < first) | (chosen >= own - near), NONE, chosen).sort(-1, descending=True).values
        rest = rest[..., : int((rest >= 0).sum(-1).max())]
        return given, [
            *near_rows(shape, width, near, first, chosen.device),
            *of_rows(rest, shape, blocks, width, "all"),
        ]

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        table = marked(chosen, -(-given.key.shape[2] // self.block_keys))
        at = (*self.place(chosen, given), divided(J, self.block_keys))
        keep = conjunction(given.rule.keep, load(len(given.captured), at, BOOL))
        return given._replace(captured=[*given.captured, table], rule=replace(given.rule, keep=keep))

    def place(self, chosen: Tensor, given: Operands) -> tuple[Expr, Expr, Expr]:
        """Where a row finds its list in `chosen`."""
        heads = chosen.shape[1]
        head = const(0) if heads == 1 else H if heads == given.query.shape[1] else floordiv(H, const(given.group))
        return B, head, divided(I, self.tile_rows)

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        return float(s.L) * min(s.S, self.kept_blocks(s.S) * self.block_keys)

    def keeps_all(self, region: AttentionRegion) -> bool:
        return self.kept_blocks(region.shape.S) >= -(-region.shape.S // self.block_keys)


class ScoredBlocks(BlockSelected):
    """A form whose knobs are these: the `top_k` blocks of `block` keys that score best, those of `sinks` and `window`
    among them; each query head chooses, or those of a key head as one, or all of them."""

    chooses_blocks: ClassVar[bool] = True

    # No dataclass: each form says which knobs it has, in which order, and with which values.
    block: int
    top_k: int
    sinks: int
    window: int
    share: str

    @property
    def block_keys(self) -> int:
        return self.block

    @property
    def always(self) -> tuple[int, int]:
        return always_of(self.sinks, self.window, self.block, self.tile_rows)

    def kept_blocks(self, S: int) -> int:
        always = always_blocks(self.sinks, self.window, self.block, self.tile_rows)
        return torch.sym_min(max(self.top_k, always), -(-S // self.block))

    def choice_heads(self, given: Operands) -> int:
        return {"head": given.query.shape[1], "group": given.key.shape[1], "all": 1}[self.share]

    def best(
        self, score: Tensor, own: Tensor, last: Tensor, given: Operands, *, mass: int = 0, least: int = 0,
        together: bool = False,
    ) -> Tensor:  # fmt: skip
        """The choice, from the score of each block for each head that chooses, as `top_blocks` takes it.

        own, last: as `top_blocks`, but of query heads.
        """
        own, last = (joined(x, self.choice_heads(given), "amax") for x in (own, last))
        window = self.window + self.tile_rows - 1 if self.window else 0
        return top_blocks(
            score, own, last, self.block, self.kept_blocks(given.key.shape[2]),
            sinks=self.sinks, window=window, mass=mass, least=least, together=together,
        )  # fmt: skip


def marked(chosen: Tensor, blocks: Any) -> Tensor:
    """Which of `blocks` blocks are in each list: (..., n) -> (..., blocks) boolean; other numbers are none."""
    table = torch.zeros((*chosen.shape[:-1], blocks + 1), dtype=torch.bool, device=chosen.device)
    inside = torch.where((chosen < 0) | (chosen > blocks), blocks, chosen.long())
    return table.scatter(-1, inside, True)[..., :blocks]


def scale_of(given: Operands) -> float:
    """The factor of the product in the scores; 1 / sqrt(E) where they are no multiple of it."""
    return given.rule.scale or given.query.shape[-1] ** -0.5


def is_prefix(keep: Expr) -> bool:
    """Whether `keep` is `j <= i + a constant` and no more."""
    least = distances(keep)[0]
    return least is not None and keep == parse(f"j - i <= {-least}")


def ends(keep: Expr) -> bool:
    """Whether `keep` is `j <= a number of the row` and no more: it takes no key out before the last one."""
    if keep.op != "le":
        return keep == TRUE
    terms = dict(terms_of(keep.args[0])[1])
    return terms.pop(J, 0) == 1 and not any("j" in atom.names() for atom in terms)


@dataclass(frozen=True)
class _United:
    """Tiles of a kernel that some of their rows chose, if rows with lists of their own choose independently.

    pairs: chosen by one head. rows: with one list.
    """

    whole: FlashWork
    pairs: float
    rows: int

    def __call__(self, block_m: int, block_n: int) -> TileCount:
        found = self.whole.tile_count(block_m, block_n)
        share = min(1.0, self.pairs / max(found.visited * block_m * block_n, 1.0))
        united = 1.0 - (1.0 - share) ** -(-block_m // self.rows)
        return TileCount(found.visited * united, found.visited * united, found.longest * united)


def divided(e: Expr, by: int) -> Expr:
    """`e // by`."""
    return e if by == 1 else floordiv(e, const(by))


def always_of(sinks: int, window: int, block: int, rows: int = 1) -> tuple[int, int]:
    """Blocks that hold the first `sinks` keys, and blocks before the last one of `rows` rows that `window` reaches."""
    return -(-sinks // block), near_blocks(window + rows - 1 if window else 0, block) if window else -1


def always_blocks(sinks: int, window: int, block: int, rows: int = 1) -> int:
    """Blocks that each list keeps whatever it scores, at most."""
    return sum(always_of(sinks, window, block, rows)) + 1
