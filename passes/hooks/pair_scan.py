"""torch's associative scan of pairs (a, b), where it is a linear recurrence: h_t = a_t h_{t-1} + b_t.

    (a1, b1), (a2, b2) -> (a1 a2, a2 b1 + b2)

Source: Blelloch 1990, "Prefix sums and their applications", section 1.4; torch._higher_order_ops.associative_scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnc.op_recurrence import RECURRENCE


def pair_scan(
    combine_fn: Callable[..., Any], xs: Any, dim: int, reverse: bool = False, combine_mode: str = "pointwise"
) -> Any:
    """All a_1 ... a_t, and all h_t; xs: two tensors of one shape."""
    a, b = xs
    factors, added = a.movedim(dim, 0), b.movedim(dim, 0)
    if reverse:
        factors, added = factors.flip(0), added.flip(0)
    value = added.reshape(added.shape[0], -1).t()[None, :, :, None]
    decay = factors.reshape(factors.shape[0], -1).t()[None]
    rule = "decay='token'; factors=True"
    if b.dtype == torch.float64:
        rule = "decay='token'; factors=True; state='float64'"
    out, _ = RECURRENCE(None, None, value, decay, None, None, None, None, rule)
    states = out[0, :, :, 0].t().reshape(added.shape)
    products = factors.cumprod(0)
    if reverse:
        states, products = states.flip(0), products.flip(0)
    return products.movedim(0, dim), states.movedim(0, dim)


def no_pair(arguments: Mapping[str, Any]) -> str | None:
    """Refuses scans of anything else, asked with numbers."""
    xs, combine = arguments["xs"], arguments["combine_fn"]
    if not isinstance(xs, tuple) or len(xs) != 2 or not all(isinstance(x, Tensor) for x in xs):
        return "it scans something other than two tensors"
    if xs[0].shape != xs[1].shape or not all(x.is_floating_point() for x in xs) or not callable(combine):
        return "its two tensors differ in shape or hold no floating numbers"
    draw = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 3, *[1] * (xs[0].dim() - 1), generator=draw, dtype=torch.float64)
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            first, second = combine((a, b), (c, d))
    except Exception as exc:  # noqa: BLE001  # a function of its own kind: the scan is traced as it is
        return f"its function does not run on numbers ({type(exc).__name__})"
    if torch.allclose(first, a * c) and torch.allclose(second, c * b + d):
        return None
    return "its function is not (a1 a2, a2 b1 + b2), which a linear recurrence needs"


def small_scan(arguments: Mapping[str, Any], g: torch.Generator) -> dict[str, Any]:
    """Five steps of the same tensors, others cut to two."""
    rank = arguments["xs"][0].dim()
    dim = arguments["dim"] % rank
    shape = [5 if d == dim else 2 for d in range(rank)]
    a, b = (torch.randn(shape, generator=g).to(x.dtype).requires_grad_() for x in arguments["xs"])
    return {**arguments, "xs": (a, b), "combine_mode": "generic"}
