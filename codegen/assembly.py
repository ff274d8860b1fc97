"""What a compiled kernel does in its hottest loop, read from its assembly text.

The hottest loop is the natural loop with the most matrix instructions that holds no smaller loop with any, of equals
the shortest: tiles without a mask. Without matrix instructions it is the one with the most exponentials, then the
largest; without a loop the whole kernel. Blocks that the assembler has moved behind the end (spinning on a barrier) are
found by following branches, not by spans of lines.

Source: Aho, Lam, Sethi, Ullman 2006, "Compilers", section 9.6 (dominators, natural loops); mnemonics from NVIDIA,
"CUDA Binary Utilities", and AMD, "CDNA3 Instruction Set Architecture".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Class of an instruction by the start of its mnemonic; the first row that fits counts.
SASS_CLASSES = (
    ("mma", ("HMMA", "IMMA", "QMMA", "OMMA", "BMMA", "DMMA")),
    ("wgmma", ("HGMMA", "QGMMA", "IGMMA", "BGMMA")),
    ("tcgen05", ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", "UTCMXQMMA")),
    ("exp2", ("MUFU.EX2",)),
    ("special", ("MUFU",)),
    ("float", ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "FCHK", "FSWZ", "HADD", "HMUL", "HFMA", "HMNMX")),
    ("float", ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")),
    ("convert", ("F2F", "F2I", "I2F", "F2IP", "FRND")),
    ("shared", ("LDSM", "LDS", "STSM", "STS", "ATOMS")),
    ("tensor_memory", ("LDTM", "STTM", "UTCCP")),
    ("local", ("LDL", "STL")),
    ("global", ("LDGSTS", "LDG", "STG", "ATOMG", "ATOM", "REDG", "RED.", "UTMA", "UBLKCP", "LD.", "ST.")),
    ("branch", ("BRA", "BRX", "BRXU", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK")),
    ("sync", ("BAR", "SYNCS", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE", "NANOSLEEP")),
    ("sync", ("UTCBAR", "ARRIVES")),
    ("none", ("NOP",)),
    ("uniform", ("U", "R2UR", "LDCU", "S2UR", "ELECT", "VOTEU")),
    ("integer", ("",)),
)
AMD_CLASSES = (
    ("mfma", ("v_mfma", "v_smfmac", "v_wmma")),
    ("exp2", ("v_exp",)),
    ("special", ("v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos", "v_tanh")),
    ("convert", ("v_cvt",)),
    ("float", ("v_pk_", "v_add_f", "v_sub_f", "v_subrev_f", "v_mul_f", "v_fma", "v_max_f", "v_max3_f", "v_min_f")),
    ("float", ("v_min3_f", "v_maximum", "v_minimum", "v_mac_f", "v_div_", "v_ldexp", "v_rndne", "v_floor")),
    ("shared", ("ds_",)),
    ("local", ("scratch_",)),
    ("global", ("global_", "buffer_", "flat_", "tensor_")),
    ("branch", ("s_branch", "s_cbranch", "s_endpgm", "s_setpc", "s_swappc")),
    ("sync", ("s_barrier", "s_waitcnt", "s_wait_", "s_sched", "s_sleep")),
    ("none", ("s_nop",)),
    ("uniform", ("s_",)),
    ("integer", ("v_",)),
)
MATRIX = ("mma", "wgmma", "tcgen05", "mfma")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*)")
_LABEL = re.compile(r"^(\.L[\w.$]+|[A-Za-z_]\w*):")
_AMD_LINE = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch|tensor)_\w+)\s*([^;]*)")
_TARGET = re.compile(r"`?\(?(\.L\w+)\)?")


@dataclass(frozen=True)
class Instruction:
    """One instruction. targets: labels it may branch to. falls: whether the next one may follow it."""

    name: str
    kind: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    falls: bool = True


def class_of(name: str, table: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """The class of a mnemonic."""
    return next(kind for kind, starts in table if name.startswith(starts))


def sass_instructions(text: str, kernel: str) -> list[Instruction]:
    """The instructions of `kernel` in nvdisasm's text."""
    found: list[Instruction] = []
    labels: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith(".section\t"):
            inside = f".text.{kernel}," in line
        label = _LABEL.match(line)
        if inside and label:
            labels.append(label[1])
        match = _SASS_LINE.match(line) if inside else None
        if match is None:
            continue
        guard, name, rest = match[1], match[2], match[3]
        target = _TARGET.search(rest) if name.startswith("BRA") else None
        # A branch is conditional by its guard, or by a predicate among its operands (BRA.U !UP0, BRA.ANY P1).
        always = not guard and not re.search(r"\bU?P\d", rest) and ".DIV" not in name and ".CONV" not in name
        ends = always and name.startswith(("BRA", "EXIT", "RET", "BRX", "JMP"))
        found.append(Instruction(name, class_of(name, SASS_CLASSES), tuple(labels), target and target[1], not ends))
        labels = []
    return found


def amd_instructions(text: str, kernel: str) -> list[Instruction]:
    """The instructions of `kernel` in LLVM's AMDGPU assembly text."""
    found: list[Instruction] = []
    labels: list[str] = []
    inside = False
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            inside = inside or label[1] == kernel
            labels.append(label[1])
            inside = inside and not label[1].startswith((".Lfunc_end", ".Lfunc_begin1"))
        match = _AMD_LINE.match(line) if inside else None
        if match is None:
            continue
        name, rest = match[1], match[2]
        target = _TARGET.search(rest) if name.startswith(("s_branch", "s_cbranch")) else None
        ends = name.startswith(("s_branch", "s_endpgm", "s_setpc"))
        found.append(Instruction(name, class_of(name, AMD_CLASSES), tuple(labels), target and target[1], not ends))
        labels = []
    return found


def hottest_loop(code: Sequence[Instruction]) -> Mapping[str, int]:
    """Instructions per class in the hottest loop, one warp, one pass.

    "loops" counts nothing of the loop: it is 0 where the kernel has no loop and the whole of it is counted.
    """
    best: tuple[tuple[int, int, int], Counter[str]] | None = None
    loops = [(body, Counter(code[k].kind for k in body)) for body in natural_loops(code)]
    matrix = [(body, kinds) for body, kinds in loops if any(kinds[m] for m in MATRIX)]
    for body, kinds in matrix or loops:
        if any(other < body for other, _ in matrix):
            continue
        rank = (sum(kinds[m] for m in MATRIX), kinds["exp2"], -len(body) if matrix else len(body))
        if best is None or rank > best[0]:
            best = rank, kinds
    counted = best[1] if best is not None else Counter(i.kind for i in code)
    return {**{kind: count for kind, count in sorted(counted.items()) if kind != "none"}, "loops": len(loops)}


def natural_loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The instructions of every natural loop; loops with the same head are one."""
    starts, succ = _blocks(code)
    dominators = _dominators(succ)
    before: list[list[int]] = [[] for _ in succ]
    for block, after in enumerate(succ):
        for other in after:
            before[other].append(block)
    bodies: dict[int, set[int]] = {}
    for block, after in enumerate(succ):
        for head in after:
            if dominators[block] >> head & 1:
                body = bodies.setdefault(head, {head})
                stack = [block]
                while stack:
                    at = stack.pop()
                    if at not in body:
                        body.add(at)
                        stack.extend(before[at])
    ends = starts[1:] + [len(code)]
    return [frozenset(k for b in body for k in range(starts[b], ends[b])) for body in bodies.values()]


def _blocks(code: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """First instruction of every basic block, and its successors."""
    starts = sorted(
        {0}
        | {k for k, i in enumerate(code) if i.labels}
        | {k + 1 for k, i in enumerate(code[:-1]) if i.target or not i.falls}
    )
    at = {label: b for b, start in enumerate(starts) for label in code[start].labels} if code else {}
    succ: list[list[int]] = []
    for b, end in enumerate(starts[1:] + [len(code)]):
        last = code[end - 1] if code else None
        after = [b + 1] if last is not None and last.falls and b + 1 < len(starts) else []
        if last is not None and last.target in at:
            after.append(at[last.target])
        succ.append(after)
    return starts, succ


def _dominators(succ: Sequence[Sequence[int]]) -> list[int]:
    """For each block the set of blocks on every way to it, as bits; nothing for a block that is never reached."""
    reached, stack = {0}, [0]
    while stack:
        for other in succ[stack.pop()]:
            if other not in reached:
                reached.add(other)
                stack.append(other)
    every = (1 << len(succ)) - 1
    found = [every if b in reached else 0 for b in range(len(succ))]
    if found:
        found[0] = 1
    before: list[list[int]] = [[] for _ in succ]
    for block in reached:
        for other in succ[block]:
            before[other].append(block)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(succ)):
            if block not in reached:
                continue
            new = every
            for other in before[block]:
                new &= found[other]
            new |= 1 << block
            changed = changed or new != found[block]
            found[block] = new
    return found


def spilled(code: Sequence[Instruction]) -> int:
    """Bytes that a thread stores to its stack, as ptxas counts spill stores: once for each place in the code."""
    width = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    stores = [i.name.split(".") for i in code if i.name.startswith("STL")]
    return sum(next((width[part] for part in parts if part in width), 4) for parts in stores)


def amd_figure(text: str, name: str) -> int:
    """A number of the kernel's metadata, `.name: 12`; 0 where it is absent."""
    match = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


def cuda_figures(usage: str, kernel: str) -> dict[str, int]:
    """Registers and stack bytes per thread in the text of cuobjdump --dump-resource-usage.

    Raises: ValueError where the kernel is not in it.
    """
    match = re.search(rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump names no kernel {kernel}")
    return {"registers": int(match[1]), "stack_bytes": int(match[2])}
