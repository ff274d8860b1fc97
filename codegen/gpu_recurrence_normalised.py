"""Gradients of recurrences that are divided by a normaliser or gated by exp(beta), through those that are not.

    o = num / (n + eps), or num / (max(|n|, exp(-m)) + eps)        n: what the same recurrence gives for v = 1
    num and n come from one recurrence whose value has a column of ones; its gradients are do / (..) and, for that
    column, -do . o / (..) where n is what was divided by

An exponential gate is a decay f_t + m_{t-1} - m_t and a gate exp(beta_t - m_t) under the running maximum m; what comes
back to those and to m goes on through `held_down` by autograd. The forward runs again, because n was not kept.

Source: Beck et al. 2024, arXiv:2405.04517, appendix (mLSTM); the quotient rule.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_recurrence import RecurrenceKnobs, forward, prepared
from attnc.codegen.gpu_recurrence_backward import backward
from attnc.codegen.gpu_segments import held_down
from attnc.rule_recurrence import RecurrenceRule


def normalised_backward(
    kernels: Any, inputs: Given, grads: tuple[Tensor, Tensor], rule: RecurrenceRule, knobs: RecurrenceKnobs
) -> Given:
    """Gradients of the inputs of a forward under `rule`; as `backward`, which does the rules without either."""
    grad_out, grad_state = grads
    x, initial = prepared(inputs, rule), inputs.initial
    V, normalised = x.value.shape[3], rule.normaliser != "none"
    columns = V + normalised
    plain = without_normaliser(rule)
    wide = torch.cat([x.value, torch.ones_like(x.value[..., :1])], -1) if normalised else x.value
    first = None if initial is None else initial[..., :columns]
    inner = inputs._replace(
        query=x.query, key=x.key, value=wide, decay=x.decay, beta=x.beta, initial=first, a=x.a, b=x.b
    )
    d_wide, of_maximum = grad_out.float(), None
    saved = None
    if normalised:
        read, _, saved = forward(kernels, inner, plain, knobs)
        d_wide, of_maximum = _divided(d_wide, read[..., :V], read[..., V:], x.maximum, rule)
    found = backward(kernels, inner, (d_wide, grad_state[..., :columns]), plain, knobs, saved=saved)
    found = found._replace(value=found.value[..., :V].to(inputs.value.dtype))
    pairs = ((name, getattr(found, name), getattr(inputs, name)) for name in ("query", "key", "a", "b"))
    found = found._replace(**{name: grad.to(own.dtype) for name, grad, own in pairs if own is not None})
    if initial is not None:
        assert found.initial is not None
        missing = initial.shape[-1] - columns
        found = found._replace(initial=torch.nn.functional.pad(found.initial, (0, missing)))
    if rule.gate != "exp":
        return found
    assert x.maximum is not None
    of_maximum = torch.zeros_like(x.maximum) if of_maximum is None else of_maximum
    of_maximum[..., -1] += grad_state[..., -1].sum(-1)
    return _through_maximum(found, of_maximum, inputs, x.segments, rule)


def without_normaliser(rule: RecurrenceRule) -> RecurrenceRule:
    """The rule whose gradients those of `rule` go through."""
    exponential = rule.gate == "exp"
    return replace(
        rule,
        normaliser="none",
        out="state",
        gate="write" if exponential else rule.gate,
        decay="token" if exponential else rule.decay,
    )


def _divided(
    do: Tensor, num: Tensor, n: Tensor, maximum: Tensor | None, rule: RecurrenceRule
) -> tuple[Tensor, Tensor | None]:
    """Gradients of numerator and normaliser, side by side, and of the running maximum that holds the latter up."""
    least = None
    divisor = n + rule.eps
    if rule.normaliser == "max1":
        least = torch.ones_like(n) if maximum is None else torch.exp(-maximum)[..., None]
        divisor = torch.maximum(n.abs(), least) + rule.eps
    d_num = do / divisor
    d_n = -(d_num * num / divisor).sum(-1, keepdim=True)
    of_maximum = None
    if least is not None:
        above = n.abs() > least
        of_maximum = torch.where(above, 0.0, -d_n * least)[..., 0]
        d_n = torch.where(above, d_n * n.sign(), 0.0)
    return torch.cat([d_num, d_n], -1), of_maximum


def _through_maximum(
    found: Given, of_maximum: Tensor, inputs: Given, segments: Tensor | None, rule: RecurrenceRule
) -> Given:
    """Gradients of decay, gate and initial state as they were given."""
    with torch.enable_grad():
        own = [t if t is None else t.detach().requires_grad_() for t in (inputs.decay, inputs.beta, inputs.initial)]
        assert own[1] is not None
        results = held_down(own[0], own[1], own[2], segments, rule)
        learned = [t for t in own if t is not None]
        slopes = iter(torch.autograd.grad(results, learned, (found.decay, found.beta, of_maximum), allow_unused=True))
    of_decay, of_beta, of_initial = (None if t is None else next(slopes) for t in own)
    first = found.initial
    if first is not None and of_initial is not None:
        first = first + of_initial
    return found._replace(decay=of_decay, beta=of_beta, initial=first)
