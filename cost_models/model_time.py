"""Time of a prompt, a decode step or a training step of a whole model: its calls one after the other.

Attention, matrix products, experts and gated delta rules are predicted by `latency.predict`; what it has no kind for
(norms, lightning and Mamba scans, embeddings, the optimizer) and what it has no device or type for by the plain
roofline. Intervals add up end to end, as if all errors had one sign.

Not counted: rotary embedding, routing, residual additions, communication, host time.

Source: passes of training as in Korthikanti et al. 2022, arXiv:2205.05198 (no recomputation); a backward of attention
of 2.5 forwards as in Dao 2023, arXiv:2307.08691; memory roof and launch from shared/gpus.md, "Efficiency factors".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from sympy import Integer

from attnc.cost_models.device_kinds import LAUNCH_S, MEMORY_SHARE, Cpu, Device, Gpu
from attnc.cost_models.estimate import PLAIN, Estimate
from attnc.cost_models.latency import predict
from attnc.cost_models.layers import USUAL, Conventions, Experts, FeedForward, Layer, Norms, Product
from attnc.cost_models.mixers import Attention, LatentAttention, Recurrence
from attnc.cost_models.model_card import PHASES, ModelCard
from attnc.errors import UsageError, did_you_mean

# Types a model runs in: bytes per weight, name in a datasheet, in torch, and in the latency tables ("" is in none).
DTYPES: Mapping[str, tuple[float, str, str, str]] = {
    "bf16": (2, "bf16", "bfloat16", "bf16"),
    "fp16": (2, "fp16", "float16", "bf16"),
    "fp8": (1, "fp8", "float8_e4m3fn", "fp8"),
    "fp32": (4, "fp32", "float32", ""),
}
ACTIVATION = 2.0  # bytes per element between calls, where weights are no wider
USABLE = 0.9  # of the memory; the rest is left for activations and the allocator
# Training with AdamW: bytes per parameter kept (weight, gradient, float32 copy and two moments) and moved by a step.
KEPT_FP32, MOVED_FP32 = 12.0, 24.0
PASSES = {"products": 3.0, "attention": 3.5}
ROWS = {"mixer": "projections", "ffn": "feed-forward", "router": "router", "head": "output head"}


@dataclass(frozen=True)
class Setting:
    """What is asked: `batch` sequences of `context` tokens in `phase`, weights in `dtype`, keys and values in `kv`."""

    batch: int
    context: int
    phase: str = "decode"
    dtype: str = "bf16"
    kv: str = "bf16"
    how: Conventions = USUAL

    def __post_init__(self) -> None:
        for name, allowed in (("phase", PHASES), ("dtype", tuple(DTYPES)), ("kv", tuple(DTYPES))):
            value = getattr(self, name)
            if value not in allowed:
                near = did_you_mean(value, allowed) or " Name one of them."
                raise UsageError(f"{name} {value!r}: allowed are {', '.join(allowed)}.{near}")
        for name in ("batch", "context"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise UsageError(f"{name} {getattr(self, name)}: allowed are 1 to 1000000000. Correct it.")

    @property
    def new(self) -> int:
        """New tokens of a sequence."""
        return 1 if self.phase == "decode" else self.context

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    @property
    def item(self) -> float:
        return DTYPES[self.dtype][0]

    @property
    def kv_item(self) -> float:
        return DTYPES[self.kv][0]

    @property
    def activation(self) -> float:
        return max(ACTIVATION, self.item)


@dataclass(frozen=True)
class Call:
    """`count` equal calls. kind: of the latency tables, or "" for the plain roofline over `flops` and `bytes`."""

    row: str
    flops: float
    bytes: float
    count: float = 1
    kind: str = ""
    shape: Mapping[str, object] | None = None
    passes: float = 1.0
    dtype: str = "bf16"


# Calls.


def step_calls(card: ModelCard, at: Setting) -> list[Call]:
    """The calls of one step, equal ones counted."""
    calls = [call for layer, count in card for call in _layer_calls(layer, count, at)]
    ends = card.embedding
    heads = at.batch if at.phase == "prefill" and at.how.head == "last" else at.tokens
    calls += [_product(p, heads, 1, at) for p in ends.products]
    calls.append(_moving("embedding", 2 * at.tokens * ends.d, 1, at))
    if at.phase == "train":
        moved = card.parameters().total * (MOVED_FP32 + 3 * at.item)
        calls.append(Call("optimizer", 0, moved, dtype=at.dtype))
    return calls


def _layer_calls(layer: Layer, count: int, at: Setting) -> Iterator[Call]:
    for product in layer.fixed if isinstance(layer, Experts) else layer.products:
        yield _product(product, at.tokens, count, at)
    if isinstance(layer, Norms):
        yield _moving("norms", 2 * at.tokens * layer.width, layer.count * count, at)
    elif isinstance(layer, FeedForward):
        yield _moving("feed-forward", (2 + layer.gated) * at.tokens * layer.width, count, at)
    elif isinstance(layer, Experts):
        yield _experts(layer, count, at)
    elif isinstance(layer, Attention):
        yield _attention(layer, count, at)
    elif isinstance(layer, LatentAttention):
        yield _latent(layer, count, at)
        if 0 < layer.index_top < at.context:
            yield from _index(layer, count, at)
    elif isinstance(layer, Recurrence) and layer.rule in DELTAS:
        yield from _delta(layer, count, at)
    elif isinstance(layer, Recurrence):
        yield _scan(layer, count, at)


def _passes(at: Setting, what: str = "products") -> float:
    return PASSES[what] if at.phase == "train" else 1.0


def _moving(row: str, elements: float, count: float, at: Setting) -> Call:
    return Call(row, 0, elements * at.activation, count, passes=_passes(at), dtype=at.dtype)


def _product(p: Product, tokens: int, count: int, at: Setting) -> Call:
    moved = p.inputs * p.outputs * at.item + tokens * (p.inputs + p.outputs) * at.activation
    shape = {"m": tokens, "n": p.outputs, "k": p.inputs}
    flops = 2.0 * tokens * p.inputs * p.outputs
    return Call(ROWS[p.role], flops, moved, count * p.copies, "gemm", shape, _passes(at), at.dtype)


def _experts(layer: Experts, count: int, at: Setting) -> Call:
    expert, chosen = layer.expert, max(1, round(layer.chosen))
    met = layer.experts * (1 - (1 - layer.chosen / layer.experts) ** at.tokens)
    moved = met * expert.active_weights("ffn") * at.item + 4 * at.tokens * chosen * expert.d * at.activation
    shape = {
        "tokens": at.tokens,
        "d_model": expert.d,
        "d_ff": layer.width,
        "experts": layer.experts,
        "topk": chosen,
        "gated": int(layer.gated),
        "routing": "balanced",
    }
    flops = 2.0 * at.tokens * layer.chosen * expert.active_weights("ffn")
    return Call("experts", flops, moved, count, "moe", shape, _passes(at), at.dtype)


def _mixing_flops(layer: Layer, at: Setting, term: int = 0) -> float:
    mixing, length = layer.mixing(at.phase, at.how)[term], Integer(at.context)
    pairs = mixing.reach.keys(length) if at.phase == "decode" else mixing.reach.pairs("half", length)
    return at.batch * (mixing.pair * float(pairs) + mixing.token * at.new)


def _attention_call(
    layer: Layer, count: int, at: Setting, kind: str, heads_wide: int, shape: dict[str, object]
) -> Call:
    """heads_wide: elements of queries and outputs of one token together."""
    seen = min(at.context, layer.reach.limit or at.context)
    read = at.batch * (at.context if at.phase != "decode" else seen) * layer.kv_elements * at.kv_item
    moved = read + at.tokens * heads_wide * at.activation
    dtype = "bf16" if at.dtype == "fp8" else at.dtype
    dtype = "bf16_kvfp8" if at.kv == "fp8" and dtype != "fp32" else dtype
    return Call("attention", _mixing_flops(layer, at), moved, count, kind, shape, _passes(at, "attention"), dtype)


def _attention(layer: Attention, count: int, at: Setting) -> Call:
    span, batch, length = layer.reach, at.batch, at.context
    if span.shape == "chunk" and length > span.width:  # a prompt is many short ones, a decode step reads one chunk
        batch, length = (batch if at.phase == "decode" else batch * ceil(length / span.width)), span.width
    windowed = span.shape == "window" and span.width < length
    shape: dict[str, object] = {
        "batch": batch,
        "seq_q": 1 if at.phase == "decode" else length,
        "seq_kv": length,
        "q_heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "window": span.width if windowed else 0,
    }
    kind = "attn_decode" if at.phase == "decode" else "attn_prefill"
    return _attention_call(layer, count, at, kind, 2 * layer.heads * layer.head_dim, shape)


def _latent(layer: LatentAttention, count: int, at: Setting) -> Call:
    if 0 < layer.index_top < at.context and at.how.mla == "phase":
        wide = layer.heads * (layer.latent + layer.kv_rank)
        return _attention_call(layer, count, at, "dsa", wide, {**_sparse(layer, at), "stage": "sparse_attn"})
    absorbed = at.how.mla in ("absorbed", "padded") or (at.how.mla == "phase" and at.phase == "decode")
    key = layer.latent if absorbed else layer.nope + layer.rope
    value = layer.kv_rank if absorbed else layer.v
    shape: dict[str, object] = {"batch": at.batch, "seq_q": at.new, "seq_kv": at.context, "q_heads": layer.heads}
    shape |= {"head_dim_qk": key, "head_dim_v": value}
    kinds = {("decode", True): "mla_decode", ("prefill", False): "mla_prefill", ("train", False): "mla_prefill"}
    kind = kinds.get((at.phase, absorbed), "")
    return _attention_call(layer, count, at, kind, layer.heads * (key + value), shape)


def _index(layer: LatentAttention, count: int, at: Setting) -> Iterator[Call]:
    """Scores of the indexer against every key, and the choice of the best."""
    shape = _sparse(layer, at)
    pairs = at.batch * at.context * (1 if at.phase == "decode" else at.context / 2)
    moved = at.batch * at.context * layer.index_dim * at.kv_item + 4 * pairs
    passes = _passes(at)
    logits = "fp8" if at.dtype == "fp8" else at.dtype
    flops = _mixing_flops(layer, at, 1)
    yield Call("attention", flops, moved, count, "dsa", {**shape, "stage": "index_logits"}, passes, logits)
    yield Call("attention", 0, 4 * pairs, count, "dsa", {**shape, "stage": "topk"}, passes)


def _sparse(layer: LatentAttention, at: Setting) -> dict[str, object]:
    return {
        "score_mode": "top_last",
        "batch": at.batch,
        "seq_q": at.new,
        "prefix": at.context - at.new,
        "q_heads": layer.heads,
        "index_heads": layer.index_heads,
        "index_dim": layer.index_dim,
        "topk": layer.index_top,
        "head_dim_qk": layer.latent,
        "head_dim_v": layer.kv_rank,
    }


# Which measured rule stands for a recurrence: JetBlock is a gated delta rule.
DELTAS = {"gdn": "gdn", "jet": "gdn", "kda": "kda"}


def _delta(layer: Recurrence, count: int, at: Setting) -> Iterator[Call]:
    shape: dict[str, object] = {
        "variant": DELTAS[layer.rule],
        "phase": "decode" if at.phase == "decode" else "prefill",
        "batch": at.batch,
        "seq": at.new,
        "k_heads": layer.k_heads or layer.heads,
        "v_heads": layer.heads,
        "head_k_dim": layer.key_dim,
        "head_v_dim": layer.value_dim,
        "d_conv": layer.conv_width,
    }
    scan = _scan(layer, count, at)
    stage = "recurrent" if at.phase == "decode" else "scan"
    inputs = 2 * at.tokens * layer.conv_channels * at.activation
    conv = Call("recurrence", 0, inputs, count, "gdn", {**shape, "stage": "conv"}, _passes(at))
    kept = Call(scan.row, scan.flops, scan.bytes, count, "gdn", {**shape, "stage": stage}, scan.passes)
    yield from (conv, kept)


def _scan(layer: Recurrence, count: int, at: Setting) -> Call:
    """A scan reads inputs and writes outputs, and its state once; a decode step reads and writes its state."""
    wide = layer.heads * (2 * layer.key_dim + 2 * layer.value_dim) if layer.rule != "mamba" else 4 * layer.heads
    states = (2 if at.phase == "decode" else 1) * layer.state_elements * 4 + layer.conv_elements * at.activation
    moved = at.tokens * wide * at.activation + at.batch * states
    return Call("recurrence", _mixing_flops(layer, at), moved, count, passes=_passes(at), dtype="bf16")


# Time.


def call_estimate(call: Call, device: Device) -> Estimate:
    """Seconds of all of `call.count` calls: the only door between calls and how they are predicted."""
    table = call.dtype if call.dtype in ("bf16_kvfp8", "fp8") else DTYPES.get(call.dtype, (0, "", "", ""))[3]
    if call.kind and table and isinstance(device, Gpu):
        one = predict(call.kind, device, {**(call.shape or {}), "dtype": table})
    else:
        one = plain(call, device)
    return one * (call.count * call.passes)


def plain(call: Call, device: Device) -> Estimate:
    """Seconds of one call by the roofline: the slower of products and traffic, and a launch."""
    compute = call.flops / matrix_rate(device, call.dtype) if call.flops else 0.0
    launch = device.launch_s if isinstance(device, Cpu) else LAUNCH_S
    share = 1.0 if isinstance(device, Cpu) else MEMORY_SHARE
    seconds = max(compute, call.bytes / (share * device.bandwidth)) + launch
    return PLAIN.around(seconds)


def matrix_rate(device: Device, dtype: str) -> float:
    """FLOP/s that large matrix products of `dtype` reach.

    Raises: UsageError where the device has no rate for it.
    """
    name, torch_name = DTYPES["bf16" if dtype == "bf16_kvfp8" else dtype][1:3]
    if isinstance(device, Cpu):
        if dtype == "fp8":
            raise UsageError(f"fp8 on {device.name}: found a CPU, which has no rate for it. Ask for bf16 or fp32.")
        return device.matmul * device.speed(torch_name)
    if isinstance(device, Gpu) and name == "fp32":
        return device.fp32_flops * device.matmul_share()
    if isinstance(device, Gpu) and name in device.tensor:
        return device.tensor[name] * device.matmul_share(name)
    known = ", ".join(device.tensor) if isinstance(device, Gpu) else "none"
    raise UsageError(
        f"{dtype} on {device.name}: found no matrix rate for it; it has {known} and fp32. Ask for another."
    )


def step_time(card: ModelCard, device: Device, at: Setting) -> dict[str, Estimate]:
    """Seconds of one step by row ("attention", "projections", ...), and of all as "total"."""
    matrix_rate(device, at.dtype)
    rows: dict[str, list[Estimate]] = {}
    for call in step_calls(card, at):
        rows.setdefault(call.row, []).append(call_estimate(call, device))
    summed = {row: _sum(parts) for row, parts in rows.items()}
    return {**summed, "total": _sum(summed.values())}


def _sum(parts: Iterable[Estimate]) -> Estimate:
    return sum(parts, Estimate(0.0, 0.0, 0.0))


# Memory.


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. largest_batch: sequences that fit beside the weights; None where the memory is not known."""

    weights: float
    per_sequence: float
    needed: float
    usable: float | None
    largest_batch: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.usable is None else self.needed <= self.usable


def memory(card: ModelCard, device: Device, at: Setting) -> Memory:
    """Weights, caches and, in training, gradients and optimizer; activations are not counted, USABLE leaves room."""
    parameters = card.parameters().total
    training = at.phase == "train"
    weights = parameters * (2 * at.item + KEPT_FP32 if training else at.item)
    each = 0.0 if training else card.cache_bytes(at.context, at.kv_item)
    usable = USABLE * device.memory_bytes if isinstance(device, Gpu) else None
    largest = None
    if usable is not None and each:
        largest = max(0, int((usable - weights) // each))
    return Memory(weights, each, weights + at.batch * each, usable, largest)
