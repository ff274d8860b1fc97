"""The child process that compiles kernels ahead of time: `python -m attnc.codegen.compile_worker <folder> <bytes>`.

One line of JSON in, one out, until the input ends. A process of its own, because the compiler may crash, hang or eat
the memory, and because the interpreter that tests run under cannot be mixed with compilation. It imports neither torch
nor Triton: the kernel's own text does that.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from attnc.codegen.assembly import (
    amd_figure,
    amd_instructions,
    cuda_figures,
    hottest_loop,
    sass_instructions,
    spilled,
)

WARP = {"cuda": 32, "hip": 64}


class Refused(Exception):
    """The job cannot be compiled; says why in words that follow the kernel's name."""


def serve(folder: str, memory_bytes: int) -> None:
    """Answer jobs until the input ends, in a scratch folder; what the compiler prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line), folder)) + "\n")
            answers.flush()
    except BrokenPipeError:
        pass  # nobody is left to hear the answer
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a killed parent cannot


def answer(job: dict[str, Any], scratch: str) -> dict[str, Any]:
    """The figures of one job, or {"failure": why}."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            return _compiled(job, Path(folder))
        except Refused as error:
            return {"failure": str(error)}
        except MemoryError:
            return {"failure": "the compiler ran out of memory", "transient": True}
        except Exception as error:  # noqa: BLE001  whatever the compiler raises is its refusal
            return {"failure": f"the compiler refused it: {_said(error)}"}


def _said(error: Exception) -> str:
    """What an error of the compiler says, in one line: the place it names, then the last word."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" \t^")]
    if not lines:
        return type(error).__name__
    place = f"{lines[0].rstrip(':')}, " if lines[0].startswith("at ") and len(lines) > 1 else ""
    return f"{type(error).__name__}: {place}{lines[-1]}"[:300]


def _compiled(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    module = _loaded(job["text"], folder)
    triton = sys.modules.get("triton")
    if triton is None:
        raise Refused("its text does not import triton")
    triton.knobs.cache.dir = str(folder / "cache")
    kernel = getattr(module, job["kernel"], None)
    if kernel is None or not hasattr(kernel, "arg_names"):
        raise Refused("its text defines no kernel of that name under @triton.jit")
    backend, arch = job["target"].split(":")
    target = sys.modules["triton.backends.compiler"].GPUTarget(
        backend, int(arch) if backend == "cuda" else arch, WARP[backend]
    )
    source = sys.modules["triton.compiler"].ASTSource(kernel, **_arguments(kernel, job, triton))
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"], **job["options"]}
    binary = triton.compile(source, target=target, options=options)
    name = getattr(binary.metadata, "name", job["kernel"])
    figures = _hip(binary.asm["amdgcn"], name) if backend == "hip" else _cuda(triton, binary.asm["cubin"], name, folder)
    warps = getattr(binary.metadata, "num_warps", job["num_warps"])
    return {**figures, "shared_bytes": int(binary.metadata.shared), "threads": int(warps) * WARP[backend]}


def _loaded(text: str, folder: Path) -> ModuleType:
    path = folder / "kernel.py"
    path.write_text(text, encoding="utf-8")
    spec = spec_from_file_location("attnc_kernel_to_compile", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(kernel: Any, job: dict[str, Any], triton: ModuleType) -> dict[str, Any]:
    """Types, constants and divisibility of the kernel's arguments, as Triton's compiler takes them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int], list] = {}
    for k, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in job["constexprs"]:
            signature[name] = "constexpr"
            constants[name] = _constant(job["constexprs"][name], triton)
        elif name in job["signature"]:
            kind, _, hint = job["signature"][name].partition(":")
            signature[name] = kind
            if hint == "16" or (kind.startswith("*") and not hint):
                hints[(k,)] = [["tt.divisibility", 16]]
        elif parameter.has_default:
            signature[name] = "constexpr"
            constants[name] = parameter.default
        else:
            raise Refused(f"its argument {name} has neither a type nor a value")
    unknown = sorted({*job["signature"], *job["constexprs"]} - set(kernel.arg_names))
    if unknown:
        raise Refused(f"it has no argument {', '.join(unknown)}; its arguments are {', '.join(kernel.arg_names)}")
    return {"signature": signature, "constexprs": constants, "attrs": hints}


def _constant(value: Any, triton: ModuleType) -> Any:
    """A constant as the kernel sees it: the text "tl.float16" stands for that type."""
    if isinstance(value, str) and value.startswith("tl."):
        return getattr(triton.language, value.removeprefix("tl."))
    return value


def _hip(text: str, name: str) -> dict[str, Any]:
    return {
        "registers": amd_figure(text, "vgpr_count"),
        "spill_bytes": 4 * amd_figure(text, "vgpr_spill_count"),
        "stack_bytes": amd_figure(text, "private_segment_fixed_size"),
        "instructions": dict(hottest_loop(amd_instructions(text, name))),
    }


def _cuda(triton: ModuleType, cubin: bytes, name: str, folder: Path) -> dict[str, Any]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = _tool(triton, "cuobjdump", "--dump-resource-usage", str(path))
    code = sass_instructions(_tool(triton, "nvdisasm", "-c", "-ndf", str(path)), name)
    if not code:
        raise Refused("nvdisasm shows none of its instructions")
    return {
        **cuda_figures(usage, name),
        "spill_bytes": spilled(code),
        "instructions": dict(hottest_loop(code)),
    }


def _tool(triton: ModuleType, name: str, *arguments: str) -> str:
    """Output of one of the binary utilities that come with Triton."""
    program = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
