"""Kernels' parameters are bound by their names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnc.codegen.launch import launch, named, strides
from attnc.errors import LoweringError

TABLE = torch.zeros(3, 5).mT


def test_names_stand_for_tensors_strides_lengths_sizes_and_buffers() -> None:
    assert named("t0", [TABLE], []) is TABLE and named("captured", [], []) is None
    assert (named("t0_s0", [TABLE], []), named("t0_d0", [TABLE], []), named("n1", [], [4, 7])) == (1, 5, 7)
    assert named("g0", [], [], {0: TABLE}) is TABLE
    assert strides("q", torch.zeros(2, 3, 4, 5)) == {"q_b": 60, "q_h": 20, "q_l": 5, "q_e": 1}


@pytest.mark.parametrize("name", ["t1", "t1_s0", "n0", "g0", "p_q", "i"])
def test_a_parameter_that_nothing_holds_is_a_sentence(name: str) -> None:
    with pytest.raises(LoweringError, match=f"its parameter '{name}' was not given"):
        named(name, [TABLE], [])


def test_a_compiled_kernel_does_not_run_on_cpu_tensors() -> None:
    kernel = SimpleNamespace(arg_names=["p_q"], device_caches={}, __name__="flash")
    with pytest.raises(LoweringError, match="Set TRITON_INTERPRET=1"):
        launch(kernel, 1, {"p_q": TABLE})
