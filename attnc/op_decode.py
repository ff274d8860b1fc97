"""The operator `attnc::flash_decode`: few query rows over many keys, by generated Triton kernels; no gradient.

    flash_decode(query, key, value, captured, sizes, spelling) -> (out, lse)
    spelling = FORM{knobs} | RULE        e.g. "flash_decode{splits=8} | score=0.125 * s; empty=never"
               FORM{knobs} @ STORE | RULE    where kernels are kept elsewhere than in the user's own store

With the knob value=in_key the value must be key[..., :Ev]; it is then read from the key's tile and never by itself.

Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L) float32. lse is
natural and holds the sink. On a GPU compilers see the kernels; on CPU, where Triton's interpreter runs them, one opaque
operator.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference", pytorch.org/blog/flash-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from attnc.codegen import gpu_decode, gpu_flash
from attnc.codegen.gpu_decode import KERNELS, DecodeKnobs
from attnc.codegen.launch import slots_of
from attnc.forms import parse_generated
from attnc.forms.flash_decode import FlashDecode
from attnc.forms.generated import store_in
from attnc.op_flash import kernels_of
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule

library = torch.library.Library("attnc", "FRAGMENT")
library.define(
    "flash_decode_interpreted(Tensor query, Tensor key, Tensor value, Tensor[] captured, SymInt[] sizes, str spelling) "
    "-> (Tensor, Tensor)"
)


@lru_cache(maxsize=1024)
def parse_decode(spelling: str) -> tuple[DecodeKnobs, bool, AttentionRule]:
    """The schedule, whether the value is the key's first channels, and the rule of a spelling.

    Raises: UsageError if it is not one.
    """
    form, rule = parse_generated(spelling, FlashDecode)
    return form.schedule, form.value_in_key, rule


def _launch(
    query: Tensor, key: Tensor, value: Tensor, captured: Sequence[Tensor], sizes: Sequence[int], spelling: str
) -> tuple[Tensor, Tensor]:
    knobs, value_in_key, rule = parse_decode(spelling)
    slots = slots_of(captured, [False] * len(captured))
    kernels = kernels_of("flash_decode", rule, slots, query.device.type, KERNELS, store_in(spelling))
    x = Operands(query, key, value, captured, sizes, rule)
    return gpu_decode.decode(kernels, x, knobs, value_in_key=value_in_key)


def _fake(query: Tensor, key: Tensor, value: Tensor, captured: Any, sizes: Any, spelling: str) -> tuple[Tensor, Tensor]:
    return gpu_flash.empty_out(query, value)


library.impl("flash_decode_interpreted", _launch, "CPU")
torch.library.register_fake("attnc::flash_decode_interpreted", _fake, lib=library)


@triton_op("attnc::flash_decode", mutates_args=())
def flash_decode(
    query: Tensor, key: Tensor, value: Tensor, captured: Sequence[Tensor], sizes: Sequence[int], spelling: str
) -> tuple[Tensor, Tensor]:
    """out and lse of the spelled attention."""
    if query.device.type == "cpu":
        return torch.ops.attnc.flash_decode_interpreted(query, key, value, captured, sizes, spelling)
    return _launch(query, key, value, captured, sizes, spelling)
