"""The `attnc::recurrence` operator: one node for any linear recurrence over tokens, opaque to whatever compiles it.

    recurrence(query, key, value, decay, rates, beta, bonus, initial_state, spelling, a, b, documents)
        -> (out, final_state)
    spelling = RULE or FORM{knobs} | RULE, or FORM{knobs} @ STORE | RULE where kernels are kept elsewhere, e.g.
        "chunked{chunk_size=32} | decay='token'; scale=0.25; chunk=64"

Shapes: query, key (B, Hk, L, K), Hk a divisor of H; value (B, H, L, V) -> out (B, H, L, V), laid out as (B, L, H, V);
states (B, H, K, V + n): behind V stand the normaliser and the running maximum, as far as the rule has them. decay,
rates and beta as the rule says; bonus (H, K), under an exponential gate (H,). Missing query and key are ones, K = 1.
With low_rank, a and b (B, Hk or H, L, K); with packed, documents (B, L), integers: the state given belongs to the
document of token 0, the final one to the last document.

The graph keeps one node in the forward and one in the backward, which computes the forward again and differentiates it.

Source: torch.library (operators that compilers do not look into); `attnc.rule_recurrence` for the systems covered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnc.codegen import cpu_recurrence
from attnc.codegen.cpu_recurrence import Given
from attnc.forms import parse_recurrence
from attnc.forms.generated import store_in
from attnc.rule_recurrence import RecurrenceRule

_INPUTS = (
    "Tensor? query, Tensor? key, Tensor value, Tensor? decay, Tensor? rates, Tensor? beta, Tensor? bonus, "
    "Tensor? initial_state"
)
library = torch.library.Library("attnc", "FRAGMENT")
_MORE = "Tensor? a=None, Tensor? b=None, Tensor? documents=None"
library.define(
    f"recurrence({_INPUTS}, str spelling, {_MORE}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
library.define(
    f"recurrence_backward(Tensor grad_out, Tensor grad_state, {_INPUTS}, Tensor? a, Tensor? b, Tensor? documents, "
    "bool[] needs, str spelling) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, (form, rule) = _in_order(args), parse_recurrence(args[8])
    with torch.amp.autocast(inputs[2].device.type, enabled=False):
        given = Given(*inputs)
        if form is None:
            return cpu_recurrence.recurrence(given, rule)
        return form.run(given, rule, store=store_in(args[8]))


def _in_order(args: Sequence[Any]) -> list[Any]:
    """The operands of a call, a, b and documents behind the others."""
    return [*args[:8], *args[9:], *[None] * (12 - len(args))]


def _meta(value: Tensor, key: Tensor | None, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """Unwritten results: new memory, whatever the inputs share."""
    B, H, L, V = value.shape
    K = 1 if key is None else key.shape[-1]
    acc = cpu_recurrence.DTYPES[rule.state]
    out = value.new_empty(B, L, H, V, dtype=value.dtype if rule.out == "value" else acc).transpose(1, 2)
    return out, value.new_empty(B, H, K, V + rule.columns, dtype=acc)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _meta(args[2], args[1], parse_recurrence(args[8])[1])


def _backward(*args: Any) -> list[Tensor]:
    grad_out, grad_state, *inputs, needs, spelling = args
    form, rule = parse_recurrence(spelling)
    with _autograd_on(), torch.amp.autocast(grad_out.device.type, enabled=False):
        given = Given(*inputs)
        if form is None:
            return cpu_recurrence.gradients(given, needs, grad_out, grad_state, rule)
        return form.gradients(given, needs, (grad_out, grad_state), rule, store=store_in(spelling))


@contextmanager
def _autograd_on() -> Iterator[None]:
    """Autograd, which the dispatcher has turned off inside of an operator."""
    off = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradMPS", "AutogradXPU", "AutogradOther", "ADInplaceOrView"):
        off = off.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off), torch.enable_grad():
        yield


def _fake_backward(*args: Any) -> list[Tensor]:
    """Gradients laid out as the inputs are: a transposed one goes back through its transpose without a copy."""
    _, _, *inputs, needs, _ = args
    return [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.spelling = inputs[8]
    ctx.save_for_backward(*_in_order(inputs))


def _differentiate(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    given = len(ctx.needs_input_grad)  # operands left to their default are not counted
    needs = [bool(need) for need in _in_order([*ctx.needs_input_grad, *[False] * (12 - given)])]
    found = iter(RECURRENCE_BACKWARD(grad_out, grad_state, *inputs, needs, ctx.spelling))
    grads = [next(found) if need else None for need in needs]
    return (*grads[:8], None, *grads[8:])[:given]


def _twice(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "attnc::recurrence is not differentiable twice: its gradients have none of their own. Use the plain formula "
        "where second derivatives are needed: leave the region as written, or compile without attnc."
    )


library.impl("recurrence", _forward, "CompositeExplicitAutograd")
library.impl("recurrence_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("attnc::recurrence", _fake, lib=library)
torch.library.register_fake("attnc::recurrence_backward", _fake_backward, lib=library)
torch.library.register_autograd("attnc::recurrence", _differentiate, setup_context=_remember, lib=library)
torch.library.register_autograd("attnc::recurrence_backward", _twice, lib=library)

RECURRENCE = torch.ops.attnc.recurrence.default
RECURRENCE_BACKWARD = torch.ops.attnc.recurrence_backward.default
