"""Keys near rows: positions of rows among the keys, and the blocks of keys that a tile of rows is near to.

Source: Beltagy et al. 2020, "Longformer", arXiv:2004.05150, section 3.1 (a window); StreamingLLM, arXiv:2309.17453.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE
from attnc.codegen.selectors import last_keys, positions_of
from attnc.operands import Operands
from attnc.predicate import distances


def never_ahead(given: Operands) -> bool:
    """Whether the mask says at which distance the last key of a row is, as a causal one does."""
    return distances(given.rule.keep)[0] is not None


def row_positions(given: Operands) -> Tensor:
    """Position of each row's own token among the keys, (1 or B, L): the largest of its heads, 0 for a row without."""
    found = positions_of(given, last_keys(given)).amax(1).clamp(min=0)
    return found.expand(found.shape[0], given.query.shape[2])


def tile_spans(position: Tensor, tile: int, S: int) -> tuple[Tensor, Tensor]:
    """Least and largest position of each tile of rows, over all sequences, (tiles,)."""
    spare = -position.shape[1] % tile
    low = F.pad(position, (0, spare), value=S).unflatten(1, (-1, tile)).amin((0, 2))
    return low, F.pad(position, (0, spare), value=NONE).unflatten(1, (-1, tile)).amax((0, 2))


def blocks_between(low: Tensor, high: Tensor, S: int, width: int) -> Tensor:
    """Numbers of the blocks that hold keys low .. high, (...) -> (..., n), NONE behind them."""
    low, high = low.clamp(min=0) // width, high.clamp(max=S - 1) // width
    at = low.unsqueeze(-1) + torch.arange(int((high - low).max()) + 1, device=low.device)
    return torch.where(at <= high.unsqueeze(-1), at, NONE)
