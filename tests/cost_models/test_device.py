"""The table of GPUs is the survey's, figure by figure; names, limits, sources."""

from __future__ import annotations

import json
import pickle
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from attnc.cost_models.device import (
    Cpu,
    Gpu,
    device_from_torch_name,
    device_named,
    gpu_named,
    shipped,
)
from attnc.errors import UsageError

SHARED = Path(__file__).resolve().parents[3] / "shared"
SURVEY, SHEETS = SHARED / "gpus.md", SHARED / "measurements" / "gpus.json"
GPUS = [device for device in shipped().devices.values() if isinstance(device, Gpu)]
SPAN = re.compile(r"(\d[\d.]*)(?:–(\d[\d.]*))?")
KIB, MIB = 1024, 1024**2

# The fields that the survey's flags call unsure.
FLAGGED = {
    "a10g": {"sms", "fp32_flops", "tensor"},
    "l40s": {"l2_bytes"},
    "h100-nvl": {"sms", "clock_hz"},
    "h20": {"fp32_flops"},
    "b100": {"sms", "clock_hz"},
    "gb200": {"sms"},
    "b300": {"sms", "l2_bytes"},
}

needs_survey = pytest.mark.skipif(not SURVEY.is_file(), reason=f"the survey of GPUs is absent (looked in {SURVEY})")
needs_sheets = pytest.mark.skipif(not SHEETS.is_file(), reason=f"the spec sheets are absent (looked in {SHEETS})")


@cache
def rows(head: str) -> list[list[str]]:
    """The cells of the survey's table whose head row begins with `head`."""
    lines = SURVEY.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {head}")) + 2
    end = next(n for n in range(start, len(lines)) if not lines[n].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def spans(cell: str) -> list[tuple[float, float]]:
    """The numbers of a cell, each as (low, high); a product as written is one number."""
    plain = re.sub(r"(\d+)×(\d+)", lambda m: str(int(m[1]) * int(m[2])), cell.replace(",", ""))
    return [(float(m[1]), float(m[2] or m[1])) for m in SPAN.finditer(plain)]


def agrees(gpu: Gpu, field: str, value: float, cell: str) -> bool:
    """Whether `value`, in the cell's unit, is the cell's: its first number or one of several between slashes."""
    choices = spans(cell) if re.fullmatch(r"[\d.]+/[\d.]+", cell) else spans(cell)[:1]
    value *= gpu.per_package
    is_range = any(low < high for low, high in choices[:1]) or "?" in cell
    inside = any(low * (1 - 1e-9) <= value <= high * (1 + 1e-9) for low, high in choices)
    return inside and (field in gpu.unsure or not is_range)


def survey_rows() -> list[list[str]]:
    return rows("GPU | Arch") if SURVEY.is_file() else []


@needs_survey
def test_the_survey_was_read() -> None:
    assert len(survey_rows()) == 29 and len(rows("Target | Warps")) == 13
    names = [device_named(row[0]).name for row in survey_rows()]
    assert len(set(names)) == len(names)


@needs_survey
@pytest.mark.parametrize("row", survey_rows(), ids=lambda row: row[0])
def test_a_row_of_the_survey_is_the_device(row: list[str]) -> None:
    gpu = gpu_named(row[0])
    _, _, cc, target, sms, clock, fp32, tf32, half, fp8, fp4, int8, memory, bw, l2, link, host, ridge, source, _ = row
    assert gpu.arch == {"—": "xe-hpc"}.get(cc, cc if cc.startswith("gfx") else f"sm{cc.replace('.', '')}")
    assert gpu.target == (target if re.fullmatch(r"(cuda|hip):\w+", target) else None)
    tensor = gpu.tensor
    cells = {
        "sms": (gpu.sms, sms),
        "fp32_flops": (gpu.fp32_flops / 1e12, fp32),
        f"tensor.{gpu.half}": (tensor[gpu.half] / 1e12, half),
        "tensor.tf32": (tensor.get("tf32", 0) / 1e12, tf32),
        "tensor.fp8": (tensor.get("fp8", 0) / 1e12, fp8),
        "tensor.fp4": (tensor.get("fp4", 0) / 1e12, fp4),
        "tensor.int8": (tensor.get("int8", 0) / 1e12, int8),
        "memory_bytes": (gpu.memory_bytes / 1e9, memory),
        "bandwidth": (gpu.bandwidth / 1e12, bw),
        "l2_bytes": (gpu.l2_bytes / MIB, l2),
        "link_bytes": (gpu.link_bytes / 1e9, "—" if link.endswith("links") else link),
        "host_bytes": (gpu.host_bytes / 1e9, host),
    }
    for field, (value, cell) in cells.items():
        absent = value == 0 or field in gpu.unsure
        assert absent if cell == "—" else agrees(gpu, field, value, cell), f"{field}: {value} against {cell}"
    clocks = spans(clock)
    if clocks:
        assert (gpu.tensor_clock_hz, gpu.clock_hz) == (clocks[0][0] * 1e6, clocks[-1][0] * 1e6)
    assert (clocks and "?" not in clock) or "clock_hz" in gpu.unsure
    assert ("bf16" in tensor) == ("fp16 only" not in half) and tensor["fp16"] == tensor[gpu.half]
    assert "bandwidth" in gpu.unsure or round(gpu.ridge()) == int(ridge)
    assert set(re.findall(r"\[[CR]\]", dict(gpu.source)["figures"])) == set(re.findall(r"\[[CR]\]", source))


@needs_survey
@pytest.mark.parametrize("row", survey_rows(), ids=lambda row: row[0])
def test_what_the_survey_is_unsure_of_and_notes_is_flagged(row: list[str]) -> None:
    gpu, flags = gpu_named(row[0]), row[-1]
    assert ("**unsure**" in flags) == (gpu.name in FLAGGED) and FLAGGED.get(gpu.name, set()) <= set(gpu.unsure)
    sums = [re.search(r"fp16 acc\. ([\d.]+)|([\d.]+) fp16 acc\.", row[n]) for n in (8, 9)]
    found = {dtype: float(m[1] or m[2]) * 1e12 for dtype, m in zip(("fp16", "fp8"), sums, strict=True) if m}
    assert gpu.tensor_fp16_sums == pytest.approx(found)
    assert gpu.l3_bytes == (256 * MIB if "256 MALL" in row[14] else 0)
    assert ("fp6" in gpu.tensor) == ("fp6" in row[10])
    matrix = re.search(r"([\d.]+) mat", row[6])
    assert gpu.tensor.get("fp32", 0) * 2 == pytest.approx(float(matrix[1]) * 1e12 if matrix else 0)


@needs_survey
def test_variants_named_in_notes_have_the_figures_of_the_notes() -> None:
    for name, half, more in (
        ("v100-pcie", 112, {"fp32_flops": 14.0e12}),
        ("a10", 125, {"sms": 72, "fp32_flops": 31.2e12}),
        ("h200-nvl", 835, {"power_w": 600}),
        ("h20-141", 148, {"memory_bytes": 141e9}),
        ("gh200-144", 989.4, {"memory_bytes": 141e9, "bandwidth": 4.8e12}),
        ("mi350x", 2309.6, {}),
        ("v100-16", 125, {"memory_bytes": 16e9}),
    ):
        gpu = gpu_named(name)
        assert gpu.tensor[gpu.half] == pytest.approx(half * 1e12), name
        assert {key: getattr(gpu, key) for key in more} == pytest.approx(more), name
    powers = {"a100-pcie-40": 250, "a100-pcie": 300, "l4": 72, "t4": 70, "h100-pcie": 350, "mi325x": 1000}
    assert {name: gpu_named(name).power_w for name in powers} == powers


@needs_survey
@pytest.mark.parametrize("row", rows("Target | Warps") if SURVEY.is_file() else [], ids=lambda row: row[0])
def test_limits_are_those_of_the_survey(row: list[str]) -> None:
    words = row[0].split()
    arch = f"sm{words[1].replace('.', '')}" if words[0] == "cc" else words[0].lower()
    limits = shipped().limits[arch]
    assert limits.warps_per_sm == spans(row[1])[0][0]
    threads = re.search(r"\((\d+)\)", row[1])
    assert threads is None or limits.warps_per_sm * limits.warp_size == int(threads[1])
    assert limits.blocks_per_sm == spans(row[2])[0][0]
    registers = 8 * 64 * KIB / 4 if "engines" in row[3] else spans(row[3])[0][0]
    assert limits.registers_per_sm == registers
    sizes = (limits.shared_per_sm, limits.shared_per_block, limits.l1_bytes)
    assert sizes == tuple(spans(cell)[0][0] * KIB for cell in row[4:7])


@needs_survey
def test_matmuls_seen_are_those_of_the_survey() -> None:
    table = {row[0]: row[1:] for row in rows("GPU | Best dense")}
    named = {
        "A100 SXM / PCIe": (("a100", "a100-pcie"), ()),
        "H100 SXM (H200 same)": (("h100",), ("h100", "h200")),
        "GH200": (("gh200",), ("gh200",)),
        "B200 / B300 / GB200": (("b200", "b300", "gb200"), ("b200", "b300", "gb200")),
        "MI300X / MI325X / MI355X": (("mi300x", "mi325x", "mi355x"), ()),
    }
    assert table.keys() == named.keys()
    for title, lists in named.items():
        for dtype, names, cell in zip(("bf16", "fp8"), lists, table[title], strict=True):
            found = [(float(m[1]), int(m[2])) for m in re.finditer(r"(\d+) \((\d+)%", cell)]
            assert len(found) == len(names)
            for name, (rate, percent) in zip(names, found, strict=True):
                assert gpu_named(name).matmul_seen[dtype] == rate * 1e12
                assert round(100 * gpu_named(name).matmul_share(dtype)) == percent
    assert gpu_named("h200").matmul_seen["bf16"] == gpu_named("h100").matmul_seen["bf16"]


@needs_sheets
def test_the_spec_sheets_beside_the_measurements_agree() -> None:
    sheets = {name: row for name, row in json.loads(SHEETS.read_text()).items() if name != "note"}
    assert len(sheets) == 6
    for name, row in sheets.items():
        gpu = gpu_named(name)
        assert (gpu.arch, gpu.sms, round(gpu.clock_hz / 1e6)) == (row["arch"], row["sms"], row["clock"])
        assert round(gpu.tensor["bf16"] / 1e12) == row["bf16"]
        assert round(gpu.tensor.get("fp8", 0) / 1e12) == (row["fp8"] or 0)
        assert (round(gpu.bandwidth / 1e9), gpu.l2_bytes / MIB) == (row["mem"], row["l2"])
        assert (gpu.power_w, gpu.shared_per_sm / KIB) == (row["tdp"], row["smem_kb"])
        assert gpu.memory_bytes / 1e9 == row["mem_gb"] and "power_w" not in gpu.unsure


def test_secondary_roofs_are_those_of_the_survey() -> None:
    assert gpu_named("h100").exp2_rate == pytest.approx(3.9e12, rel=0.02)
    assert gpu_named("b200").exp2_rate == pytest.approx(4.7e12, rel=0.02)
    for gpu in GPUS:
        assert gpu.exp2_per_clock == (32 if gpu.arch == "sm103" else 16), gpu.name
        assert gpu.shared_bytes_per_clock == 128
        if gpu.arch.startswith("sm"):
            assert gpu.fma_per_clock == (64 if gpu.arch in ("sm70", "sm75", "sm80") else 128), gpu.name


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_figures_of_a_gpu_hang_together(gpu: Gpu) -> None:
    assert 2 * gpu.fma_per_clock * gpu.sms * gpu.clock_hz == pytest.approx(gpu.fp32_flops, rel=0.04)
    assert bool(gpu.target) != bool(gpu.no_target)
    assert gpu.shared_per_block <= gpu.shared_per_sm <= gpu.l1_bytes or gpu.arch.startswith("gfx")
    assert dict(gpu.source)["figures"] and gpu.limits_source
    assert bool(gpu.matmul_seen) == ("matmul" in dict(gpu.source))
    assert "power_w" not in gpu.unsure or "[R]" in dict(gpu.source)["power"]
    assert 0.3 < gpu.matmul_share() < 0.9 and 0.3 < gpu.matmul_share("fp8") < 0.9
    assert gpu.engine("flash").rate > 0 and gpu.speed("bfloat16") >= 1.0
    assert pickle.loads(pickle.dumps(gpu)) == gpu and hash(gpu) == hash(pickle.loads(pickle.dumps(gpu)))


def test_dies_with_a_cache_each_have_a_source() -> None:
    assert {gpu.name: gpu.dies for gpu in GPUS if gpu.dies > 1} == dict.fromkeys(
        ("mi300x", "mi325x", "mi355x", "mi350x"), 8
    )
    for gpu in GPUS:
        assert (gpu.dies > 1) == ("dies" in dict(gpu.source)), gpu.name
        assert gpu.sms % gpu.dies == 0 and gpu.l2_bytes % gpu.dies == 0


def test_no_two_devices_share_a_name() -> None:
    owners: dict[str, set[str]] = {}
    for gpu in GPUS:
        for spelling in (gpu.name, gpu.title, *gpu.also):
            owners.setdefault(re.sub(r"[^a-z0-9]", "", spelling.lower()), set()).add(gpu.name)
    assert {p: names for p, names in owners.items() if len(names) > 1} == {}


TORCH_NAMES = {
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-PCIE-32GB": "v100-pcie",
    "Tesla T4": "t4",
    "NVIDIA A10G": "a10g",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB300": "gb300",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtxpro6000",
    "AMD Instinct MI300X": "mi300x",
    "Intel(R) Data Center GPU Max 1550": "max1550",
    "H100 SXM": "h100",
    "nvidia h100 80gb hbm3": "h100",
}


@pytest.mark.parametrize(("name", "device"), TORCH_NAMES.items())
def test_a_name_as_torch_reports_it_finds_the_device(name: str, device: str) -> None:
    capability = gpu_named(device).capability
    major, _, minor = capability.partition(".")
    assert device_from_torch_name(name, (int(major), int(minor)) if capability else None).name == device
    assert device_named(name).name == device


def test_a_name_of_another_architecture_or_of_none_is_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"compute capability 8\.0, but h100 has 9\.0"):
        device_from_torch_name("NVIDIA H100 80GB HBM3", (8, 0))
    with pytest.raises(UsageError, match=r"no such GPU.*capability 8\.9 are l4, l40s, rtx4090"):
        device_from_torch_name("NVIDIA GeForce RTX 4080", (8, 9))
    with pytest.raises(UsageError, match="Describe it in a device file"):
        device_from_torch_name("NVIDIA GeForce RTX 4080")


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'h100'"):
        device_named("H10O")
    with pytest.raises(UsageError, match="found a cpu, allowed is a GPU"):
        gpu_named("cpu")
    with pytest.raises(UsageError, match="engine 'flsh' of h100: allowed are flash"):
        gpu_named("h100").engine("flsh")


def test_the_cpu_follows_torchs_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = device_named("cpu")
        torch.set_num_threads(2)
        two = device_named("cpu")
    finally:
        torch.set_num_threads(before)
    assert isinstance(one, Cpu) and (one.threads, two.threads) == (1, 2)
    assert two.engine("flash").rate == 2 * one.engine("flash").rate and two.matmul == 2 * one.matmul
