"""Chunkwise recurrences: products of matrices inside a chunk of tokens, the state from one chunk to the next.

    G = cumulative sum of log decays in a chunk, E(i, j) = exp(G_i - G_j)
    out = (scale q exp(G)) S_n + tril(scale q k^T * E) v',   S_{n+1} = exp(G_C) S_n + (k exp(G_C - G))^T v'
    v' = v, or under the delta rule T (beta v) - T (beta k exp(G)) S_n with T = (I + tril(beta k k^T * E, -1))^-1

Shapes: q, k (B, Hk, L, K); v, out (B, H, L, V); S (B, H, K, V) at the start of each chunk. On GPUs three kernels,
`within`, `state` and `output`, and one more of each for the gradients; on CPUs segments that stay in the cache.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.3; Yang et al. 2023, arXiv:2312.06635, section 4.
Exact:  always, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnc.codegen import cpu_recurrence, gpu_recurrence, gpu_recurrence_backward
from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_recurrence import RecurrenceKnobs
from attnc.codegen.gpu_recurrence_normalised import normalised_backward
from attnc.cost_models.chunk_model import ChunkKnobs, ChunkWork, chunk_fits, chunk_interval, chunk_seconds
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.forms.base import Form, knob
from attnc.forms.recurrent import RecurrentForm, cost_in_chunks, is_elementwise
from attnc.region import Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

ON_CPU = (64, 32, 128, 16, 256)
BY_CHANNEL_ON_CPU = (64, 32, 16, 128)
QUICK = tuple(product((64, 32, 128, 16), (32, 64, 128, 16), (4, 8, 2), (2, 3, 1)))
# What lies between products: in bfloat16 their error is 5 times that of the written model, which is not exact.
PRODUCTS = "float32"


@dataclass(frozen=True)
class Chunked(RecurrentForm):
    """Chunks of `chunk_size` tokens; on GPUs blocks that keep `block_v` columns of the state."""

    name: ClassVar[str] = "chunked"
    chunk_size: int = knob(64, 16, 32, 128, 256, unit="tokens")
    block_v: int = knob(64, 16, 32, 128, unit="columns of the state")
    warps: int = knob(4, 1, 2, 8, unit="warps")
    stages: int = knob(2, 1, 3, 4, unit="tiles in flight")

    def refuse(self, region: Region) -> str | None:
        why = self.unfit(region)
        if why is not None:
            return why
        rule, shape = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(shape, RecurrenceShape)
        if is_elementwise(rule, shape):
            return "chunked needs a product of matrices in a chunk, found a decay or a state by element; use scan."
        if region.device == "cuda" and shape.L > 0:
            return gpu_recurrence.refuse(rule, shape.K, shape.V, query=shape.Hk > 0)
        return None

    def misfit(self, region: Region, device: Device) -> str | None:
        if not isinstance(device, Gpu):
            return None
        return self.untargeted(device) or chunk_fits(work_of(region), self.schedule, device)

    @property
    def schedule(self) -> ChunkKnobs:
        """The knobs as the cost model takes them."""
        return ChunkKnobs(self.chunk_size, self.block_v, self.warps, self.stages)

    def cost(self, region: Region, device: Device) -> Cost:
        return cost_in_chunks(region, self.chunk_size)

    def gpu_seconds(self, region: Region, gpu: Gpu) -> float:
        return chunk_seconds(work_of(region), self.schedule, gpu)

    def gpu_estimate(self, region: Region, gpu: Gpu) -> Estimate:
        return chunk_interval(self.gpu_seconds(region, gpu), work_of(region), gpu)

    def interval(self, seconds: float, region: Region, device: Device) -> Estimate:
        """`seconds` that this setting is predicted to take, however refined, with the interval of such predictions."""
        if isinstance(device, Gpu):
            return chunk_interval(seconds, work_of(region), device)
        held = self.estimate(region, device)
        return held * (seconds / held.seconds)

    @property
    def kernels(self) -> RecurrenceKnobs:
        """The knobs as the launcher takes them: each kernel has the same, as the cost model has it."""
        return RecurrenceKnobs(
            self.chunk_size,
            products=PRODUCTS,
            block_v=self.block_v,
            out_block_v=self.block_v,
            warps=self.warps,
            within_warps=self.warps,
            out_warps=self.warps,
            stages=self.stages,
            out_stages=self.stages,
        )

    def run(self, given: Given, rule: RecurrenceRule, *, store: str | None = None) -> tuple[Tensor, Tensor]:
        if given.value.device.type == "cpu":
            return cpu_recurrence.recurrence(given, rule, self.chunk_size)
        return self.launch(given, rule, store=store)

    def launch(self, given: Given, rule: RecurrenceRule, *, store: str | None = None) -> tuple[Tensor, Tensor]:
        """The kernels: on a GPU, or under Triton's interpreter."""
        kernels = gpu_recurrence.kernels_of(given.value.device.type, store)
        return gpu_recurrence.forward(kernels, given, rule, self.kernels)[:2]

    def gradients(
        self,
        given: Given,
        needs: list[bool],
        grads: tuple[Tensor, Tensor],
        rule: RecurrenceRule,
        *,
        store: str | None = None,
    ) -> list[Tensor]:
        if given.value.device.type == "cpu":
            return cpu_recurrence.gradients(given, needs, *grads, rule, self.chunk_size)
        return self.launch_gradients(given, needs, grads, rule, store=store)

    def launch_gradients(
        self,
        given: Given,
        needs: list[bool],
        grads: tuple[Tensor, Tensor],
        rule: RecurrenceRule,
        *,
        store: str | None = None,
    ) -> list[Tensor]:
        """`gradients` by the kernels: on a GPU, or under Triton's interpreter."""
        kernels = gpu_recurrence_backward.kernels_of(given.value.device.type, store)
        plain = rule.normaliser == "none" and rule.gate != "exp"
        run: Any = gpu_recurrence_backward.backward if plain else normalised_backward
        found = run(kernels, given, grads, rule, self.kernels)
        # Laid out as the inputs, as the operator says under compilers.
        pairs = ((x, grad) for x, grad, need in zip(given, found, needs, strict=True) if need)
        return [torch.empty_like(x).copy_(grad) for x, grad in pairs if x is not None]

    def space(self, region: Region, device: Device) -> tuple[Form, ...]:
        if self.refuse(region) is not None or self.untargeted(device) is not None:
            return ()
        bare = replace(region, path="", node="", choice=None)
        if isinstance(device, Gpu):
            start = default_for(bare, device)
            return () if start is None else (start,)
        rule = region.rule
        assert isinstance(rule, RecurrenceRule)
        sizes = BY_CHANNEL_ON_CPU if rule.decay == "channel" else ON_CPU
        return tuple(sorted(map(Chunked, sizes), key=lambda form: form.seconds(bare, device)))

    def settings(self, region: Region, device: Device) -> tuple[Chunked, ...]:
        """Every setting worth trying on `device`, this one first; none has chunks of twice the length or more."""
        rule, shape = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(shape, RecurrenceShape)
        length = max(16, shape.L)
        if not isinstance(device, Gpu):
            sizes = sorted(BY_CHANNEL_ON_CPU if rule.decay == "channel" else ON_CPU)
            return (self, *(Chunked(n) for n in sizes if n != self.chunk_size and n < 2 * length))
        work, choices = work_of(region), [sorted(k.choices) for k in self.knobs().values()]
        forms = (Chunked(*values) for values in product(*choices))
        useful = [f for f in forms if f.block_v < 2 * max(16, work.V) and f.chunk_size < 2 * length]
        return (self, *(f for f in useful if f != self and chunk_fits(work, f.schedule, device) is None))


@lru_cache(maxsize=512)
def default_for(region: Region, gpu: Gpu) -> Chunked | None:
    """The knobs the cost model picks among QUICK; None where none fits. Deterministic."""
    work = work_of(region)
    fitting = [f for f in (Chunked(*values) for values in QUICK) if chunk_fits(work, f.schedule, gpu) is None]
    offers = [(chunk_seconds(work, f.schedule, gpu), n, f) for n, f in enumerate(fitting)]
    return min(offers)[2] if offers else None


@lru_cache(maxsize=512)
def work_of(region: Region) -> ChunkWork:
    """What the region has to compute, as the cost model takes it."""
    rule, s = region.rule, region.shape
    assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
    return ChunkWork(
        s.B,
        s.H,
        s.Hk,
        s.L,
        s.K,
        s.V + rule.columns,
        region.dtype,
        rule.decay,
        rule.delta,
        rule.low_rank,
        region.training,
        PRODUCTS,
    )
