"""Roofs of a kernel: each from its figure, the largest binds, numbers and expressions agree."""

from __future__ import annotations

import pytest
import sympy

from attnc.cost_models.device import gpu_named
from attnc.cost_models.roofs import Bound, KernelWork, bound, bound_expression, roof_seconds
from attnc.errors import UsageError


def attention(d: float, pairs: float, dtype: str = "bf16") -> KernelWork:
    """Forward over `pairs` scores that stay on the chip."""
    return KernelWork(tensor={dtype: 4 * d * pairs}, exps=pairs, dram_bytes=pairs / 1e3)


@pytest.mark.parametrize(("name", "roof", "binding"), [("h100", 2.0e15, "tensor"), ("b200", 2.4e15, "tensor")])
def test_the_roof_of_exponentials_is_where_the_survey_has_it(name: str, roof: float, binding: str) -> None:
    gpu, pairs = gpu_named(name), 1e11
    times = roof_seconds(attention(128, pairs), gpu)
    assert 4 * 128 * pairs / times["exponentials"] == pytest.approx(roof, rel=0.02)
    assert bound(attention(128, pairs), gpu).binding == binding
    assert bound(attention(64, pairs), gpu_named("b200")).binding == "exponentials"
    assert bound(attention(64, pairs), gpu_named("b300")).binding == "tensor"  # twice the rate of exponentials


def test_each_roof_binds_where_its_work_is_largest() -> None:
    gpu = gpu_named("h100")
    works = {
        "tensor": KernelWork(tensor={"bf16": 1e15}),
        "vector": KernelWork(vector_flops=1e15),
        "exponentials": KernelWork(exps=1e14),
        "DRAM": KernelWork(dram_bytes=1e13),
        "L2": KernelWork(l2_bytes=1e14),
        "shared memory": KernelWork(shared_bytes=1e15),
        "launch": KernelWork(dram_bytes=1e3, launches=2),
    }
    assert {name: bound(work, gpu).binding for name, work in works.items()} == {name: name for name in works}
    assert bound(works["DRAM"], gpu).seconds == pytest.approx(1e13 / 3.35e12 + 3e-6)
    assert bound(works["DRAM"], gpu, achievable=True).seconds == pytest.approx(1e13 / 3.35e12 / 0.8 + 3e-6)
    assert bound(works["tensor"], gpu, achievable=True).roofs["tensor"] == pytest.approx(1e15 / 795e12)
    both = KernelWork(tensor={"bf16": 1e12, "fp8": 1e12})
    assert roof_seconds(both, gpu)["tensor"] == pytest.approx(1e12 / 989.4e12 + 1e12 / 1978.9e12)


def test_expressions_and_numbers_agree() -> None:
    L, gpu = sympy.Symbol("L", positive=True), gpu_named("a100")
    symbolic = KernelWork(tensor={"bf16": 512 * L**2}, exps=L**2, dram_bytes=512 * L)
    seconds = sympy.lambdify(L, bound_expression(symbolic, gpu), "math")
    for length in (1, 128, 4096, 65536):
        numbers = KernelWork(tensor={"bf16": 512.0 * length**2}, exps=length**2, dram_bytes=512 * length)
        found = bound(numbers, gpu)
        assert isinstance(found, Bound) and seconds(length) == pytest.approx(found.seconds)


def test_a_type_without_matrix_units_is_a_sentence() -> None:
    with pytest.raises(UsageError, match="roofs of a100: found fp8 products; its matrix units have tf32, bf16"):
        bound(attention(128, 1e9, "fp8"), gpu_named("a100"))
