"""What a recurrence computes, as a rule without sizes, and its sizes.

    S_t = D_t S_{t-1} + w_t k_t v_t^T             the state, (K, V) for each head; with `delta`, v_t is replaced by
    o_t = q_t^T S_t                               v_t - (D_t S_{t-1})^T k_t

D_t multiplies rows of the state (`decay`), w_t is 1 or comes from beta (`gate`). With `low_rank`, b_t (a_t^T S_{t-1})
is added to the state: a transition of diagonal plus low rank, of which the delta rule is a case. With `read` "before",
o_t = q_t^T (S_{t-1} + diag(bonus) w_t k_t v_t^T). A normaliser divides by what the same recurrence gives for v = 1.
With `packed`, S_{t-1} is zero where a document starts.

Source: systems of part D of the catalogue: Yang et al. 2024, arXiv:2406.06484 (delta rule) and arXiv:2412.06464
(gated); Dao and Gu 2024, arXiv:2405.21060 (Mamba-2); Gu and Dao 2023, arXiv:2312.00752 (Mamba); Beck et al. 2024,
arXiv:2405.04517 (mLSTM); Peng et al. 2023, arXiv:2305.13048 (RWKV-4), 2024, arXiv:2404.05892 (RWKV-6), and 2025,
arXiv:2503.14456 (RWKV-7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.errors import UsageError
from attnc.rule import Rule, Shape

ALLOWED: dict[str, tuple[str, ...]] = {
    "memory": ("state", "taps"),
    "decay": ("none", "head", "token", "channel", "state"),
    "gate": ("none", "write", "exp"),
    "read": ("after", "before"),
    "normaliser": ("none", "sum", "max1"),
    "state": ("float32", "float64"),
    "out": ("value", "state"),
}


@dataclass(frozen=True)
class RecurrenceRule(Rule):
    """What one linear recurrence over tokens computes.

    memory:     "state", or "taps": a causal convolution of `conv` taps is the mixer itself.
    decay:      "none"; "head" (H,), constant; "token" (B, H, L); "channel" (B, H, L, K); "state": token (B, H, L) times
                rates (H, K). As logarithms, or as factors with `factors`.
    delta:      the delta rule: what the state holds for k is replaced, not added to.
    low_rank:   b (a^T S) is added, a and b (B, Hk or H, L, K); a reads the state before its decay.
    packed:     several documents in a row, told apart by `documents` (B, L): neighbours that differ start anew.
    gate:       "none"; "write": beta (B, H, L) multiplies k v^T; "exp": exp(beta) does, held down by a running maximum.
    read:       "after" the update, or "before" it, with a bonus for the token itself.
    normaliser: "none"; "sum": o / (n + eps); "max1": o / (max(|n|, 1) + eps), both under the running maximum.
    scale:      factor of q. qk_norm: the epsilon under the root where q and k are divided by their Euclidean norm.
    chunk:      tokens per chunk as written; 1 where it steps through tokens.
    state:      dtype of the state and the arithmetic. out: dtype of the output: the value's or the state's.
    state_in, state_out: whether a state is given, and whether the last one is used.
    conv:       taps of the causal depthwise convolution on what comes in; 0 for none.
    """

    kind: ClassVar[str] = "recurrence"

    memory: str = "state"
    decay: str = "none"
    factors: bool = False
    delta: bool = False
    low_rank: bool = False
    packed: bool = False
    gate: str = "none"
    read: str = "after"
    normaliser: str = "none"
    eps: float = 0.0
    scale: float = 1.0
    qk_norm: float | None = None
    chunk: int = 1
    state: str = "float32"
    out: str = "value"
    state_in: bool = False
    state_out: bool = False
    conv: int = 0

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"make a recurrence rule: found {name}={getattr(self, name)!r}, allowed are {', '.join(allowed)}. "
                    "Name one of them."
                )
        if self.delta and (self.decay == "state" or self.factors or self.gate == "exp" or self.read == "before"):
            raise UsageError(
                "make a recurrence rule: found the delta rule with decay 'state', factors, gate 'exp' or read "
                "'before', allowed is a logarithmic decay by head, token or channel. Leave the other out."
            )

        if self.low_rank and (self.delta or self.decay == "state" or self.factors or self.gate == "exp"):
            raise UsageError(
                "make a recurrence rule: found low_rank with the delta rule, decay 'state', factors or gate 'exp', "
                "allowed is a logarithmic decay by head, token or channel and gate 'write'. Leave the other out."
            )

    @property
    def columns(self) -> int:
        """Columns of the state beyond V: the normaliser, and the running maximum under an exponential gate."""
        return (self.normaliser != "none") + (self.gate == "exp")

    @property
    def name(self) -> str:
        """The mixer in the words of the field."""
        if self.memory == "taps":
            return "short convolution"
        if self.delta:
            gated = {"none": "delta rule", "channel": "delta rule with decay by channel"}
            return gated.get(self.decay, "gated delta rule")
        if self.low_rank:
            return "diagonal plus low rank"
        if self.gate == "exp":
            return "mLSTM" if self.normaliser == "max1" else "exponential average with bonus"
        if self.decay == "state":
            return "selective scan"
        if self.factors:
            return "linear recurrence"
        known = {"none": "linear attention", "head": "linear attention with constant decay"}
        return known.get(self.decay, f"linear attention with decay by {self.decay}")

    def flops(self, shape: RecurrenceShape) -> int:
        """FLOP of the products, forward, in chunks as written; decays and gates not counted."""
        if self.memory == "taps":
            return 2 * self.conv * shape.B * shape.H * shape.L
        within = min(self.chunk, shape.L) if self.chunk > 1 else 0
        update_and_read = 4 * shape.K * shape.V
        in_chunk = 2 * within * (shape.K + shape.V)
        correct = self.delta * (2 * shape.K * shape.V + 2 * within * shape.K + within * (shape.K + shape.V))
        correct += self.low_rank * (4 * shape.K * shape.V + within * (6 * shape.K + 5 * shape.V))
        return shape.B * shape.H * shape.L * (update_and_read + in_chunk + correct)

    def elements(self, shape: RecurrenceShape) -> int:
        """Elements of query, key, value, decay, gate, output and states, each once."""
        tokens, state = shape.B * shape.L, shape.B * shape.H * shape.K * (shape.V + self.columns)
        if self.memory == "taps":
            return tokens * 2 * shape.H + shape.H * self.conv
        per_token = {"none": 0, "head": 0, "token": 1, "channel": shape.K, "state": 1}[self.decay]
        each = 2 * shape.V + per_token + (self.gate != "none")
        keys = (4 if self.low_rank else 2) * shape.Hk * shape.K if shape.Hk else 0
        return tokens * (shape.H * each + keys) + state * (self.state_in + self.state_out)

    def summary(self, shape: RecurrenceShape) -> list[str]:
        """The mixer, length, heads and widths, and what the state does."""
        heads = f"heads {shape.H}" if shape.Hk in (0, shape.H) else f"heads {shape.H}/{shape.Hk}"
        if self.memory == "taps":
            return [
                self.name,
                f"L {shape.text('L')}",
                f"channels {shape.H}",
                f"taps {self.conv}",
                f"B {shape.text('B')}",
            ]
        parts = [self.name, f"L {shape.text('L')}", heads, f"state {shape.K} x {shape.V}", f"B {shape.text('B')}"]
        parts += [f"chunk {self.chunk}"] if self.chunk > 1 else ["token by token"]
        parts += [f"conv {self.conv}"] if self.conv else []
        parts += ["documents packed"] if self.packed else []
        parts += ["state in"] if self.state_in else []
        return parts + (["state out"] if self.state_out else [])


@dataclass(frozen=True)
class RecurrenceShape(Shape):
    """Sizes of one recurrence. H: heads of values and of the state; Hk: heads of keys, 0 where there are none."""

    B: int
    H: int
    L: int
    K: int
    V: int
    Hk: int = 0

    @property
    def group(self) -> int:
        """Heads of values per head of keys."""
        return self.H // self.Hk if self.Hk else 1
