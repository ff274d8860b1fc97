"""The `attnc::attention` operator: one node for any recognised attention, run by the form that its spelling names.

    attention(query, key, value, captured, sizes, spelling) -> (out, lse)
    spelling = FORM{knobs} | RULE        e.g. "dense | score=0.125 * s; keep=-i + j <= 0; empty=never"
               FORM{knobs} @ STORE | RULE    where generated kernels are kept elsewhere than in the user's own store

It is composite: tracing (AOTAutograd, export) goes through it and sees ATen or FlexAttention; autograd likewise.
lse (B, Hq, L) is natural, float32 (float64 for float64), holds the sink, and is not differentiable; unused, it leaves
nothing behind in a traced graph.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691, section 3.1 (out and log-sum-exp); torch.library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnc import op_decode, op_flash, op_recurrence, op_selected
from attnc.forms import parse_attention, spell_attention
from attnc.forms.generated import Generated, store_in
from attnc.forms.listed import Listed, unlisted
from attnc.forms.masked import alive_rows, scaled_rows, widened, without_lost_rows
from attnc.operands import Operands

__all__ = ["ATTENTION", "attention", "parse_attention", "spell_attention"]

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor[] captured, SymInt[] sizes, str spelling) "
    "-> (Tensor, Tensor)"
)
# The operators that forms call by their names.
CALLED = (op_flash.flash, op_decode.flash_decode, op_recurrence.RECURRENCE, op_selected.selected)
library = torch.library.Library("attnc", "FRAGMENT")
library.define(SCHEMA)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spelling: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the spelled form.

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L).
    Raises: UsageError if the spelling is none.
    """
    form, rule = parse_attention(spelling)
    # Types are facts of the region already: an autocast around the call must not cast inside it.
    with torch.amp.autocast(query.device.type, enabled=False):
        given = Operands(query, key, value, captured, sizes, rule)
        given = given if isinstance(form, Listed) else unlisted(given)
        given = scaled_rows(given if isinstance(form, Generated) else widened(given))
        written = given.on(query.device)  # numbers may lie apart
        given = without_lost_rows(written)
        run = form.cpu if query.device.type == "cpu" else form.gpu
        kept = {"store": store_in(spelling)} if isinstance(form, Generated) else {}
        out, lse = run(given, **kept)
        if written.rule.empty == "nan" and given.rule.empty != "nan":  # rows at -inf are not those of one low number
            out = torch.where(alive_rows(written).unsqueeze(-1), out, torch.nan)
        return out, lse


library.impl("attention", attention, "CompositeImplicitAutograd")
ATTENTION = torch.ops.attnc.attention.default  # what Dynamo keeps as one node, where it would trace `attention`
