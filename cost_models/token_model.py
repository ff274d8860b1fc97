"""Time of recurrences that go token by token or element by element: bound by memory, exponentials, or one token's wait.

    token_seconds(work, device)      closed form

Every element of the state takes a factor and a multiply-add for each token; the tokens of one block follow each other.

Source: Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785 (roofs); shared/measurements (gdn, stage
recurrent: single steps on the H100 and the RTX PRO 6000).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from attnc.cost_models.device import Gpu
from attnc.cost_models.estimate import Bounds, Estimate

LAUNCH = 3e-6
TOKEN = 500.0  # cycles from one token's loads to the next one's
MEMORY = 0.8  # share of the bandwidth
L2_SPEED = 2.5  # of the L2 over the memory
# Hold 80% of the measured steps over predicted ones; a scan over many tokens is in no table.
BOUNDS = Bounds((), (0.68,), (1.35,))


@dataclass(frozen=True)
class TokenWork:
    """B, H, L, K, V: sizes; moved: bytes of operands and results; states: bytes of states in and out.

    exps: exponentials of a token and head. tokens: those of a block that follow each other, all of them without a scan.
    """

    B: int
    H: int
    L: int
    K: int
    V: int
    moved: float
    states: float
    exps: float
    tokens: int
    training: bool = False


def token_seconds(work: TokenWork, device: Gpu) -> float:
    """Predicted seconds of the recurrence, the backward, three times the work, where it trains."""
    elements = float(work.B * work.H * work.L * work.K * work.V)
    lanes = device.sms * device.fma_per_clock * device.clock_hz
    compute = 3.0 * elements / lanes + work.B * work.H * work.L * work.exps / device.exp2_rate
    waves = ceil(work.B * work.H * ceil(work.V / 32) / (device.sms * 8))
    chain = waves * work.tokens * TOKEN / device.clock_hz
    footprint = work.moved + work.states
    ratio = (footprint / device.l2_bytes) ** 3
    missed = max(ratio / (1 + ratio), 1 / L2_SPEED)
    memory = footprint * missed / (device.bandwidth * MEMORY)
    return LAUNCH + (3.5 if work.training else 1.0) * max(compute, chain, memory)


def token_estimate(work: TokenWork, device: Gpu) -> Estimate:
    """`token_seconds` with its interval."""
    return BOUNDS.around(token_seconds(work, device))
