"""Small random arguments of the same kind as those of a call, for the rows of the table of hooks.

Each function takes the arguments of a call, tensors as fakes, and a generator; it keeps what is no tensor, the dtypes
and what is left out, and makes the tensors small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, SHORT, CHUNK = 2, 5, 16


def _drawn(arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], g: torch.Generator) -> dict[str, Any]:
    """The arguments with small tensors of these shapes in place of those that are tensors."""
    small = {
        name: torch.randn(shape, generator=g).to(arguments[name].dtype).requires_grad_()
        for name, shape in shapes.items()
        if isinstance(arguments.get(name), Tensor)
    }
    chunk = arguments.get("chunk_size")
    return {**arguments, **small, **({"chunk_size": min(chunk, CHUNK)} if isinstance(chunk, int) else {})}


def _changed(arguments: dict[str, Any], **changes: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with some tensors mapped into their range."""
    for name, change in changes.items():
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = change(arguments[name].detach()).to(arguments[name].dtype).requires_grad_()
    return arguments


def _negative(x: Tensor) -> Tensor:
    return -x.abs() - 0.1


def _length(arguments: Mapping[str, Any]) -> int:
    """A chunk and a bit, or a few tokens where nothing is cut into chunks."""
    chunk = arguments.get("chunk_size")
    return min(chunk, CHUNK) + 6 if isinstance(chunk, int) else SHORT


def delta_rule(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """query, key (B, L, Hk, K), value (B, L, H, V), g (B, L, H) or (B, L, H, K), beta, initial_state."""
    group = min(4, max(1, int(arguments["value"].shape[2]) // int(arguments["key"].shape[2])))
    L, Hk, H, K, V = _length(arguments), 2, 2 * group, 4, 3
    decay = (B, L, H, K) if arguments["g"].dim() == 4 else (B, L, H)
    shapes = {"query": (B, L, Hk, K), "key": (B, L, Hk, K), "value": (B, L, H, V), "g": decay, "beta": (B, L, H)}
    drawn = _drawn(arguments, {**shapes, "initial_state": (B, H, K, V)}, g)
    small = (lambda x: x) if arguments["use_qk_l2norm_in_kernel"] else (lambda x: 0.4 * x)
    return _changed(drawn, g=_negative, beta=torch.sigmoid, key=small)


def selective_scan(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """hidden_states or u, dt or delta, z (B, D, L), A (D, N), B, C (B, N, L) or (B, G, N, L), D and delta_bias (D,)."""
    L, D, N = SHORT, 6, 4
    keys = {3: (B, N, L), 4: (B, 2, N, L)}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("hidden_states", "u", "dt", "delta", "z"), (B, D, L))
    shapes |= {"A": (D, N), **{x: keys[arguments[x].dim()] for x in "BC"}, "D": (D,), "delta_bias": (D,)}
    return _changed(_drawn(arguments, shapes, g), A=_negative, dt=torch.abs, delta=torch.abs)


def selective_state_update(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """state (B, D, N), hidden_states or x, dt, z (B, D), A (D, N), B, C (B, N), D and dt_bias (D,)."""
    D, N = 6, 4
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("hidden_states", "x", "dt", "z"), (B, D))
    shapes |= {"state": (B, D, N), "A": (D, N), "B": (B, N), "C": (B, N), "D": (D,), "dt_bias": (D,)}
    return _written(_changed(_drawn(arguments, shapes, g), A=_negative, dt=torch.abs))


def _written(arguments: dict[str, Any]) -> dict[str, Any]:
    """A step that overwrites its state has no gradient, there as here."""
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def chunk_scan(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """hidden_states or x, z (B, L, H, P), dt (B, L, H), A, dt_bias (H,), D (H,) or (H, P), B, C (B, L, G, N),
    initial_states (B, H, P, N), seq_idx (B, L), integers."""
    group = min(4, max(1, _heads(arguments, 2) // int(arguments["B"].shape[2])))
    L, G, H, P, N = _length(arguments), 2, 2 * group, 3, 4
    by_head = (H, P) if isinstance(arguments.get("D"), Tensor) and arguments["D"].dim() == 2 else (H,)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("hidden_states", "x", "z"), (B, L, H, P))
    shapes |= {"dt": (B, L, H), "A": (H,), "D": by_head, "dt_bias": (H,)}
    shapes |= {"B": (B, L, G, N), "C": (B, L, G, N), "initial_states": (B, H, P, N)}
    return _packed(_changed(_drawn(arguments, shapes, g), A=_negative, dt=torch.abs), L, g)


def split_scan(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """zxbcdt (B, L, 2 M + 2 H P + 2 G N + H), weights by width, D (H,) or (H, P), states and seq_idx as in chunks."""
    by_head = arguments["D"].dim() == 2
    G, L, P, N = min(2, arguments["ngroups"]), _length(arguments), 4, 4
    H = 2 * G
    wide = arguments["D"].shape[0] * (arguments["D"].shape[1] if by_head else arguments["headdim"])
    given = arguments["zxbcdt"].shape[-1] - wide - arguments["conv1d_weight"].shape[0] - arguments["D"].shape[0]
    M, convolved, taps = 8 if given else 0, H * P + 2 * G * N, int(arguments["conv1d_weight"].shape[1])
    out = M + H * P
    shapes: dict[str, tuple[int, ...]] = {"zxbcdt": (B, L, 2 * M + H * P + convolved + H), "dt_bias": (H,), "A": (H,)}
    shapes |= {"conv1d_weight": (convolved, taps), "conv1d_bias": (convolved,), "D": (H, P) if by_head else (H,)}
    shapes |= {"rmsnorm_weight": (H * P,), "outproj_weight": (out, out), "outproj_bias": (out,)}
    drawn = _changed(_drawn(arguments, {**shapes, "initial_states": (B, H, P, N)}, g), A=_negative)
    return _packed(drawn, L, g) | {"ngroups": G, "headdim": None if arguments["headdim"] is None else P}


def convolution(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """x (B, D, L), channels next to each other, weight (D, W), bias (D,), states (B, D, W - 1), seq_idx (B, L)."""
    taps = int(arguments["weight"].shape[1])
    shapes = {"x": (B, SHORT, 8), "weight": (8, taps), "bias": (8,), "initial_states": (B, taps - 1, 8)}
    drawn = _drawn(arguments, shapes, g)
    turned = {
        name: x.detach().mT.requires_grad_() for name, x in drawn.items() if isinstance(x, Tensor) and x.dim() == 3
    }
    return _packed(drawn | turned, SHORT, g)


def convolution_step(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """x (B, D) or (B, D, L), conv_state (B, D, S), weight (D, W), bias (D,)."""
    shapes: dict[str, tuple[int, ...]] = {"x": (B, 8, 2)[: arguments["x"].dim()], "bias": (8,)}
    shapes |= {"conv_state": (B, 8, int(arguments["conv_state"].shape[-1]))}
    return _written(_drawn(arguments, {**shapes, "weight": (8, int(arguments["weight"].shape[1]))}, g))


def _packed(arguments: dict[str, Any], length: int, g: torch.Generator) -> dict[str, Any]:
    """The arguments with sequences in a row where seq_idx (B, L) is given."""
    if isinstance(arguments.get("seq_idx"), Tensor):
        starts = torch.rand(B, length, generator=g) < 0.2
        arguments["seq_idx"] = starts.cumsum(1).to(arguments["seq_idx"].dtype)
    return arguments


def _heads(arguments: Mapping[str, Any], axis: int) -> int:
    """Heads of the values, by either of their names."""
    return int((arguments["x"] if "x" in arguments else arguments["hidden_states"]).shape[axis])


def chunk_state_update(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """state (B, H, P, N), hidden_states or x, dt, z (B, H, P), A (H, P, N), B, C (B, G, N), D and dt_bias (H, P)."""
    group = min(4, max(1, _heads(arguments, 1) // int(arguments["B"].shape[1])))
    G, H, P, N = 2, 2 * group, 3, 4
    shapes: dict[str, tuple[int, ...]] = {"state": (B, H, P, N)}
    shapes |= dict.fromkeys(("hidden_states", "x", "z"), (B, H, P))
    shapes |= {"dt": (B, H, 1), "A": (H, 1, 1), "D": (H, P), "dt_bias": (H, 1), "B": (B, G, N), "C": (B, G, N)}
    drawn = _written(_changed(_drawn(arguments, shapes, g), A=_negative, dt=torch.abs))
    wide = {"dt": (B, H, P), "A": (H, P, N), "dt_bias": (H, P)}
    return {**drawn, **{name: drawn[name].expand(to) for name, to in wide.items() if isinstance(drawn[name], Tensor)}}


def equal_over_heads(arguments: Mapping[str, Any]) -> str | None:
    """Refuses a step of Mamba-2 whose decays are not known to be equal over the channels of a head."""
    if any(_varies(arguments["A"], axis) for axis in (1, 2)) or _varies(arguments["dt"], 2):
        return "its decays are not expanded over the channels of a head, so they may differ"
    return None


def _varies(x: Tensor, axis: int) -> bool:
    return bool(x.stride(axis)) and x.shape[axis] != 1


def rg_lru(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """hidden_states and recurrent_gate (B, L, C), reset (B, L, 1) of bool, recurrent_states (B, C)."""
    L, C = (1 if arguments["hidden_states"].shape[1] == 1 else SHORT), 4
    shapes = {"hidden_states": (B, L, C), "recurrent_gate": (B, L, C), "recurrent_states": (B, C)}
    drawn = _changed(_drawn(arguments, shapes, g), recurrent_gate=torch.sigmoid)
    reset = torch.zeros(B, L, 1, dtype=torch.bool)
    reset[0, 0] = arguments["recurrent_states"] is not None
    return {**drawn, "reset": reset}


def rwkv(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """time_decay and time_first (C,), key and value (B, L, C), state of three (B, C) or None."""
    shapes = {"time_decay": (4,), "time_first": (4,), "key": (B, SHORT, 4), "value": (B, SHORT, 4)}
    drawn = _drawn(arguments, shapes, g)
    if drawn["state"] is None:
        return drawn
    numerator, denominator, maximum = (torch.randn(B, 4, generator=g) for _ in range(3))
    return {**drawn, "state": [numerator, denominator.abs() + 0.5, maximum]}


def mlstm(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """query, key (B, H, L, K), value (B, H, L, V), gates (B, H, L), states; kernels that need it get whole chunks."""
    if "mlstm_chunkwise_kernel" not in arguments:
        return _mlstm(arguments, (min(arguments.get("chunk_size", SHORT), CHUNK),), g)
    return _mlstm(arguments, (1 if arguments["query"].shape[2] == 1 else _length(arguments),), g)


def mlstm_step(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """query, key (B, H, K), value (B, H, V), gates (B, H, 1), states."""
    return _mlstm(arguments, (), g)


def _mlstm(arguments: Mapping[str, Any], L: tuple[int, ...], g: torch.Generator) -> dict[str, Any]:
    H, K, V = 2, 4, 3
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("query", "key"), (B, H, *L, K))
    gates = (B, H, *(L or (1,)))
    shapes |= {"value": (B, H, *L, V), "igate": gates, "fgate": gates}
    for given, last in (("c_initial", (K, V)), ("n_initial", (K,)), ("m_initial", (1,))):
        shapes[given] = shapes[f"{given[0]}state"] = (B, H, *last)
    return _drawn(arguments, shapes, g)


def lightning(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """A small module like the one of the call, hidden_states (B, L, C), attention_mask (B, L), a cache of one state."""
    real, H, D, C, L = arguments["self"], 2, 4, 6, SHORT + 6
    dtype = arguments["hidden_states"].dtype
    held = {name: getattr(real, name) for name in ("layer_idx", "num_hidden_layers", "act_fn")}
    small = SimpleNamespace(**held, head_dim=D, num_attention_heads=H, block_size=4)
    small.slope_rate = real.get_slope_rate.__func__(small)
    decays = real.decay_factors.__func__(small, small.slope_rate)
    small.query_decay, small.key_decay, small.diagonal_decay = decays
    small.norm = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    for name, (out, width) in {"qkv_proj": (3 * H * D, C), "output_gate": (H * D, C), "out_proj": (C, H * D)}.items():
        weight = torch.randn(out, width, generator=g).to(dtype)
        setattr(small, name, functools.partial(F.linear, weight=weight))
    drawn = {**arguments, "self": small, "position_embeddings": None}
    drawn["hidden_states"] = torch.randn(B, L, C, generator=g).to(dtype).requires_grad_()
    if isinstance(arguments["attention_mask"], Tensor):
        drawn["attention_mask"] = (torch.rand(B, L, generator=g) > 0.3).to(arguments["attention_mask"].dtype)
    if arguments["past_key_values"] is not None:
        state = torch.randn(B, H, D, D, generator=g).to(dtype)
        drawn["past_key_values"] = SimpleNamespace(get_linear_cache=lambda i: state, set_linear_cache=lambda i, x: None)
    return drawn
