"""Kernels are compiled for targets that are not here; whatever the compiler does is a value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnc.codegen import compile_pool
from attnc.codegen.assembly import (
    SASS_CLASSES,
    Instruction,
    class_of,
    hottest_loop,
    natural_loops,
    sass_instructions,
    spilled,
)
from attnc.codegen.compile_stats import (
    SHARED_LIMIT,
    TARGETS,
    Compiled,
    Failure,
    Job,
    compile_for,
    compile_many,
    triton_version,
)

pytestmark = pytest.mark.skipif(triton_version() is None, reason="needs triton")

TEXT = """
import triton
import triton.language as tl


@triton.jit
def attend(q, k, v, o, L, S, stride, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, E)
    b_q = tl.load(q + i[:, None] * stride + e[None, :], mask=i[:, None] < L, other=0.0)
    acc = tl.zeros([BLOCK_M, E], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, S, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        b_k = tl.load(k + j[:, None] * stride + e[None, :], mask=j[:, None] < S, other=0.0)
        b_v = tl.load(v + j[:, None] * stride + e[None, :], mask=j[:, None] < S, other=0.0)
        s = tl.where(j[None, :] < S, tl.dot(b_q, tl.trans(b_k)), -1e30)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        scale = tl.exp2(top - new)
        total = total * scale + tl.sum(p, 1)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc * scale[:, None])
        top = new
    tl.store(o + i[:, None] * stride + e[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=i[:, None] < L)
"""
TYPES = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "o": "*bf16", "L": "i32", "S": "i32", "stride": "i32:16"}
TINY = {"E": 16, "block_m": 16, "block_n": 16, "num_warps": 1}  # compiled at once
MATRIX = {"cuda:90": "wgmma", "cuda:100": "tcgen05", "hip:gfx942": "mfma", "hip:gfx950": "mfma"}


def attend(target: str, folder: Path, E: int = 64, block_m: int = 128, block_n: int = 64, **settings):
    constants = {"E": E, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return compile_for(TEXT, "attend", TYPES, constants, target, folder=folder, **settings)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def check(target: str, kept: Path, warps: int) -> None:
    made = attend(target, kept, num_warps=warps, num_stages=2)
    assert isinstance(made, Compiled), made
    width = 64 if target.startswith("hip") else 32
    assert made.threads == warps * width
    assert 32 <= made.registers <= 512
    assert 64 * 64 * 2 <= made.shared_bytes <= SHARED_LIMIT[target]
    assert made.instructions[MATRIX.get(target, "mma")] > 0
    # One exponential for each score of a 128 x 64 tile, a few for the running maximum, none outside the loop; eight
    # waves with 32 rows each do not find 256 rows and do everything twice.
    doubled = 2 if target.startswith("hip") and warps == 8 else 1
    assert 0 <= made.instructions["exp2"] - doubled * 128 * 64 / made.threads <= 16
    assert made.instructions["float"] > made.instructions["exp2"]
    assert made.instructions["loops"] >= 1


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_a_kernel_compiles_for_a_gpu_that_is_not_here(target: str, kept: Path) -> None:
    check(target, kept, 4)


@pytest.mark.slow
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_compiles_for_every_target(target: str, warps: int, kept: Path) -> None:
    check(target, kept, warps)


def test_too_many_registers_are_seen_as_spills(kept: Path) -> None:
    tight = attend("cuda:80", kept, E=128, block_m=64, block_n=16, num_warps=1)  # 256 sums in each thread
    roomy = attend("cuda:80", kept, **TINY)
    assert isinstance(tight, Compiled) and isinstance(roomy, Compiled)
    assert tight.registers == 255 and tight.spill_bytes > 0 and tight.instructions["local"] > 0
    assert roomy.registers < 255 and roomy.spill_bytes == 0


def test_a_block_that_does_not_fit_is_a_failure_with_the_bytes(kept: Path) -> None:
    made = attend("hip:gfx942", kept, E=128, block_m=16, block_n=128, num_stages=3, num_warps=1)
    assert isinstance(made, Failure) and not made.transient
    assert "131072 bytes of shared memory, a block has 65536" in made.sentence


@pytest.mark.parametrize("target", ["cuda:75", "cuda:103", "hip:gfx90a", "xpu:pvc", "h100"])
def test_other_targets_are_refused_with_a_sentence(target: str, kept: Path) -> None:
    made = attend(target, kept)
    assert isinstance(made, Failure) and target in made.sentence and "cuda:80" in made.sentence


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import os\nos.abort()", "SIGABRT"),
        ("import os\nos._exit(7)", "status 7"),
        ("while True: pass", "stopped after 1 s"),
        ("x = bytes(1 << 42)", "out of memory"),
        ("x = 1", "does not import triton"),
        ("import triton", "defines no kernel"),
        ("import triton\ndef attend(): ...", "defines no kernel"),
        ("def attend(:", "SyntaxError"),
        (TEXT.replace("tl.arange(0, E)", "tl.arange(0, 96)"), "power of 2"),
        (TEXT.replace("stride,", "stride, more,"), "more has neither a type nor a value"),
        (TEXT.replace("stride", "pitch"), "pitch has neither"),
    ],
)
def test_whatever_the_compiler_does_is_a_failure(text: str, says: str, tmp_path: Path) -> None:
    constants = {"E": 64, "BLOCK_M": 64, "BLOCK_N": 64}
    made = compile_for(
        text, "attend", TYPES, constants, "cuda:80", folder=tmp_path, timeout_s=1 if "pass" in text else 60
    )
    assert isinstance(made, Failure), made
    assert says in made.sentence and "attend for cuda:80" in made.sentence
    assert made.transient == (not list(tmp_path.iterdir()))


def test_a_worker_lives_on_after_a_failure_and_is_replaced_after_a_crash(tmp_path: Path) -> None:
    for text in ("x = 1", "import os\nos.abort()"):
        assert isinstance(compile_for(text, "attend", {}, {}, "cuda:80", folder=tmp_path), Failure)
    assert isinstance(attend("cuda:80", tmp_path, **TINY), Compiled)


def test_a_killed_process_leaves_no_worker_and_no_files(tmp_path: Path) -> None:
    script = (
        "import os, threading, time\n"
        "from attnc.codegen.compile_pool import POOL\n"
        "job = {'text': 'open(\"begun\", \"w\"); import time; time.sleep(0.5)', 'kernel': 'k'}\n"
        "threading.Thread(target=POOL.run, args=(job, 60), daemon=True).start()\n"
        "while not os.path.exists('begun'): time.sleep(0.05)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert ended.returncode == -9
    deadline = time.monotonic() + 30
    while list(tmp_path.glob("attnc-compile-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [p.name for p in tmp_path.iterdir()] == ["begun"]


@pytest.fixture
def counted(monkeypatch) -> list:
    """The jobs that reach a worker, which answers at once."""
    seen: list = []
    figures = {"registers": 96, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 9, "threads": 128}
    found = {**figures, "instructions": {"mma": 4, "loops": 1}}
    monkeypatch.setattr(compile_pool.POOL, "run", lambda job, timeout: seen.append(job) or dict(found))
    return seen


def test_results_are_kept_and_a_spoilt_one_is_made_again(tmp_path: Path, counted: list) -> None:
    first = attend("cuda:80", tmp_path)
    assert isinstance(first, Compiled) and first.instructions["mma"] == 4
    assert attend("cuda:80", tmp_path) == first and len(counted) == 1
    (entry,) = tmp_path.iterdir()
    whole = entry.read_text()
    spoilt = ["", whole[: len(whole) // 2], "[1]", "{}", whole.replace('"registers": ', '"registers": 1')]
    lie = {"found": {"registers": -1}, "sum": "0"}
    for k, text in enumerate([*spoilt, json.dumps(lie)]):
        entry.write_text(text)
        assert attend("cuda:80", tmp_path) == first and len(counted) == 2 + k
    assert entry.read_text() == whole
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, counted: list) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert isinstance(attend("cuda:80", tmp_path / "file" / "below"), Compiled)
    assert len(counted) == 2


def test_the_key_holds_all_that_decides() -> None:
    base = {"text": TEXT, "kernel": "attend", "signature": TYPES, "constexprs": {"E": 64}, "target": "cuda:80"}
    others = [
        {},
        {"text": TEXT + "\n"},
        {"kernel": "other"},
        {"signature": {**TYPES, "L": "i64"}},
        {"constexprs": {"E": 128}},
        {"target": "cuda:90"},
        {"num_warps": 8},
        {"num_stages": 3},
        {"options": {"maxnreg": 128}},
    ]
    assert len({Job(**{**base, **other}).key for other in others}) == len(others)


def test_many_jobs_come_back_in_order(kept: Path) -> None:
    constants = {"E": 16, "BLOCK_M": 128, "BLOCK_N": 16}
    jobs = [Job(TEXT, "attend", TYPES, constants, "cuda:80", warps) for warps in (4, 8, 4)]
    made = compile_many(jobs, workers=2, folder=kept)
    assert [m.threads for m in made if isinstance(m, Compiled)] == [128, 256, 128]


def test_compilation_is_real_also_where_the_interpreter_is_asked_for(monkeypatch, tmp_path: Path) -> None:
    compile_pool.POOL.close()
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    assert isinstance(attend("cuda:80", tmp_path, **TINY), Compiled)


def test_a_loop_is_found_by_its_branches_and_not_by_its_lines() -> None:
    """The spin loop that waits for a barrier lies behind the end; a span of lines would swallow the epilogue."""
    text = """
	.section	.text.f,"ax",@progbits
.text.f:
        /*0000*/                   IMAD.MOV R1, RZ ;
.L_x_1:
        /*0010*/                   UTCHMMA gdesc[UR4] ;
        /*0020*/              @!P6 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   MUFU.EX2 R2, R3 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   FADD R0, R0, R1 ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR10], R4 ;
        /*0080*/              @!P6 BRA `(.L_x_3) ;
        /*0090*/                   BRA `(.L_x_2) ;
"""
    code = sass_instructions(text, "f")
    assert len(code) == 10
    assert hottest_loop(code) == {"tcgen05": 1, "exp2": 1, "branch": 4, "sync": 1, "loops": 2}
    assert sorted(map(len, natural_loops(code))) == [2, 7]
    assert sass_instructions(text, "g") == []


def test_the_inner_loop_is_hotter_than_the_outer_one() -> None:
    names = ["HMMA", "HMMA", "HMMA.16816", "BRA", "BRA", "EXIT"]
    labels = {0: ("o",), 2: ("i",)}
    targets = {3: "i", 4: "o"}
    code = [Instruction(n, class_of(n, SASS_CLASSES), labels.get(k, ()), targets.get(k)) for k, n in enumerate(names)]
    assert hottest_loop(code) == {"mma": 1, "branch": 1, "loops": 2}


def test_of_two_loops_with_the_same_products_the_one_without_a_mask_is_counted() -> None:
    names = ["ISETP", "FSEL", "HMMA", "BRA", "HMMA", "BRA", "EXIT"]
    labels = {0: ("masked",), 4: ("full",)}
    targets = {3: "masked", 5: "full"}
    code = [Instruction(n, class_of(n, SASS_CLASSES), labels.get(k, ()), targets.get(k)) for k, n in enumerate(names)]
    assert hottest_loop(code) == {"mma": 1, "branch": 1, "loops": 2}


def test_without_a_loop_the_whole_kernel_is_counted() -> None:
    code = [Instruction(n, class_of(n, SASS_CLASSES)) for n in ("MUFU.EX2", "MUFU.RCP", "LDGSTS.E", "NOP", "DEPBAR.LE")]
    assert hottest_loop(code) == {"exp2": 1, "special": 1, "global": 1, "sync": 1, "loops": 0}
    assert hottest_loop([]) == {"loops": 0}


def test_spills_are_counted_in_bytes() -> None:
    assert spilled([Instruction(n, "local") for n in ("STL", "STL.64", "STL.128", "LDL", "STL.U8")]) == 4 + 8 + 16 + 1
