"""Fill a skeleton's holes: one readable Triton file that holds what its kernels use and nothing else.

A skeleton runs as it stands. Rendering replaces, by source span, the body of each filled hole, and the parameter and
argument `captured` (`captured_grads`) of each function by the names that this function needs, its own and those of the
functions it calls: `t0, t0_s0, t0_s1, n0`. A launcher binds a kernel's parameters by name, see
`attnc.codegen.triton_text`. Functions and constants that no kernel reaches are left out.
"""

from __future__ import annotations

import ast
import builtins
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path

from attnc import __version__
from attnc.codegen.holes import PARAMETERS, holes_of
from attnc.codegen.triton_text import Slot, captured_names, gradient_names
from attnc.errors import LoweringError
from attnc.rule_attention import AttentionRule

EXPANDED: dict[str, Callable[[Iterable[str]], tuple[str, ...]]] = {
    "captured": captured_names,
    "captured_grads": gradient_names,
}
WIDTH = 120
HEAD = "import triton.language as tl\n"
SHARED = re.compile(r"^from attnc\.codegen\.skeletons\.(\w+) import (?:\([^)]*\)|[^(\n]*)\n", re.MULTILINE)


def source_hash(text: str) -> str:
    """The digest under which a source text is filed: 32 hexadecimal digits."""
    return sha256(text.encode()).hexdigest()[:32]


@cache
def skeleton_text(name: str) -> str:
    """The source of skeleton `name`, what it imports from others in place. Raises: LoweringError if there is none."""
    folder = Path(__file__).parent / "skeletons"
    known = sorted(path.stem for path in folder.glob("[!_]*.py"))
    if name not in known:
        raise LoweringError(f"read the skeleton {name!r}: found none of this name, there are {', '.join(known)}.")
    text = (folder / f"{name}.py").read_text(encoding="utf-8")
    return SHARED.sub(lambda found: skeleton_text(found[1]).partition(HEAD)[2].lstrip(), text)


def holes_in(skeleton: str) -> tuple[str, ...]:
    """The holes that a skeleton declares."""
    return _read(skeleton).holes


def render_rule(
    skeleton: str,
    rule: AttentionRule,
    captured: Sequence[Slot],
    *,
    spelling: str,
    device: str,
    kernels: Sequence[str] | None = None,
) -> str:
    """`skeleton` (its text) filled for an attention rule; arguments and errors as in `render`."""
    title = f"{spelling}: {rule.spell()}"
    holes = holes_of(rule, captured, holes_in(skeleton))
    return render(skeleton, holes, captured, spelling=title, device=device, kernels=kernels)


@lru_cache(maxsize=512)
def rule_text(
    name: str, rule: AttentionRule, captured: tuple[Slot, ...], device: str, kernels: tuple[str, ...]
) -> str:
    """The skeleton called `name` with `kernels` of it, filled for a rule: each once in a process."""
    return render_rule(skeleton_text(name), rule, captured, spelling=name, device=device, kernels=kernels)


def render(
    skeleton: str,
    holes: Mapping[str, str],
    captured: Sequence[Slot],
    *,
    spelling: str,
    device: str,
    kernels: Sequence[str] | None = None,
) -> str:
    """The text of a Triton file.

    skeleton: source text. holes: body per hole; those left out stay as the skeleton has them. captured: one slot per
    captured tensor. spelling, device: what the header says. kernels: the kernels wanted, None for all functions.
    Raises: LoweringError for a hole that the skeleton has not, with other parameters than the vocabulary's or with a
            body that is no Python or names what it cannot know.
    """
    source = _read(skeleton)
    for name, body in holes.items():
        _check_hole(source, name, body, len(captured))
    needs = {word: _needs(source, holes, word) for word in EXPANDED}
    edits = list(_expansions(source, holes, needs))
    edits += [_body_edit(source, name, body) for name, body in holes.items()]
    edits += _leave_out(source, holes, kernels)
    text = _header(skeleton, spelling, device) + _shortened(_apply(skeleton, edits))
    try:
        ast.parse(text)
    except SyntaxError as exc:
        raise LoweringError(
            f"render {spelling} for {device}: the filled skeleton is no Python, {exc}. This is an error of the "
            "skeleton: `captured` must be a plain parameter and argument."
        ) from exc
    return text


# --------------------------------------------------------------------------------------------------------------------
# Reading a skeleton
# --------------------------------------------------------------------------------------------------------------------


Span = tuple[int, int]  # from character, to character


@dataclass(frozen=True)
class _Place:
    """One spot where `word` stands: a parameter of `function` (no callee), or an argument of a call in it."""

    function: str
    word: str
    callee: str | None
    is_keyword: bool
    span: Span


@dataclass(frozen=True)
class _Source:
    text: str
    holes: tuple[str, ...]
    functions: Mapping[str, ast.FunctionDef]
    constants: Mapping[str, ast.stmt]
    uses: Mapping[str, frozenset[str]]  # function or constant -> names that it reads
    places: tuple[_Place, ...]


def _parsed(body: str) -> ast.Module:
    """A function's body on its own, `return` included."""
    return ast.parse("def body():\n" + textwrap.indent(body, "    "))


@cache
def _read(skeleton: str) -> _Source:
    try:
        tree = ast.parse(skeleton)
    except SyntaxError as exc:
        raise LoweringError(f"read a skeleton: found no Python, {exc}. Correct the skeleton.") from exc
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    declared = [node.value for node in assigned if ast.unparse(node.targets[0]) == "HOLES"]
    holes = tuple(ast.literal_eval(declared[0])) if declared else ()
    absent = [name for name in holes if name not in functions]
    if absent or not declared:
        found = f"no function {', '.join(absent)}" if absent else "no constant HOLES"
        raise LoweringError(
            f"read a skeleton: found {found}, allowed is HOLES with the names of functions. Correct the skeleton."
        )
    constants = _constants(tree)
    uses = {name: _names_in(node) for name, node in (*functions.items(), *constants.items())}
    places = tuple(place for function in functions.values() for place in _places(skeleton, function, functions))
    return _Source(skeleton, holes, functions, constants, uses, places)


def _names_in(node: ast.AST) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))


def _places(text: str, function: ast.FunctionDef, functions: Mapping[str, ast.FunctionDef]) -> Iterator[_Place]:
    """Where a function takes and hands on the words that are expanded.

    Raises: LoweringError for any other use of such a word.
    """
    for parameter in function.args.args:
        if parameter.arg in EXPANDED:
            yield _Place(function.name, parameter.arg, None, False, _span(text, parameter))
    handed = set()
    nodes = list(ast.walk(function))
    for call in (n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)):
        callee = call.func.id  # type: ignore[attr-defined]
        if callee not in functions:
            continue
        for given, value in [*((a, a) for a in call.args), *((k, k.value) for k in call.keywords)]:
            if isinstance(value, ast.Name) and value.id in EXPANDED:
                handed.add(value)
                yield _Place(function.name, value.id, callee, given is not value, _span(text, given))
    for n in nodes:
        if isinstance(n, ast.Name) and n.id in EXPANDED and n not in handed:
            raise LoweringError(
                f"render a skeleton: line {n.lineno} uses {n.id!r} in another way than as an argument of a function "
                "of the skeleton. Correct the skeleton."
            )


def _parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs))


def _check_hole(source: _Source, name: str, body: str, tensors: int) -> None:
    if name not in source.holes:
        raise LoweringError(
            f"fill the hole {name!r}: the skeleton has none of this name, but {', '.join(source.holes) or 'none'}. "
            "Fill these only (attnc.codegen.render.holes_in)."
        )
    found, wanted = _parameters(source.functions[name]), PARAMETERS.get(name)
    if wanted is not None and found != wanted:
        raise LoweringError(
            f"fill the hole {name!r}: the skeleton gives it the parameters ({', '.join(found)}), the vocabulary "
            f"({', '.join(wanted)}). Correct the skeleton."
        )
    try:
        tree = _parsed(body)
    except SyntaxError as exc:
        raise LoweringError(f"fill the hole {name!r}: its body is no Python, {exc}. It reads: {body!r}.") from exc
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    known = {n.id for n in names if isinstance(n.ctx, ast.Store)} | set(found) | set(source.functions)
    known |= {"tl", "triton", *captured_names([body]), *gradient_names([body]), *source.constants} | set(dir(builtins))
    strange = sorted({n.id for n in names} - known)
    beyond = [t for t in captured_names([body]) if t[0] == "t" and int(t[1:].partition("_")[0]) >= tensors]
    if strange or beyond:
        raise LoweringError(
            f"fill the hole {name!r}: its body names {', '.join([*strange, *beyond])}, allowed are its parameters "
            f"({', '.join(found)}) and {tensors} captured tensors. It reads: {body!r}."
        )


def _constants(tree: ast.Module) -> dict[str, ast.stmt]:
    """Module-level names that are no functions."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({n.id: node for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)})
    return found


# --------------------------------------------------------------------------------------------------------------------
# Edits
# --------------------------------------------------------------------------------------------------------------------

Edit = tuple[int, int, str]  # from character, to character, new text


def _needs(source: _Source, holes: Mapping[str, str], word: str) -> dict[str, tuple[str, ...]]:
    """The names that `word` stands for in each function: a hole's own, else those of what it hands `word` to."""
    takes = {place.function for place in source.places if place.word == word and place.callee is None}
    found = {name: set(EXPANDED[word]([holes[name]])) if name in holes else set() for name in takes}
    hands = [p for p in source.places if p.word == word and p.callee in takes and p.function not in holes]
    for _ in takes:  # as deep as calls can go
        for place in hands:
            found[place.function] |= found[place.callee]  # type: ignore[index]
    return {name: EXPANDED[word](names) for name, names in found.items()}


def _expansions(
    source: _Source, holes: Mapping[str, str], needs: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> Iterator[Edit]:
    for place in source.places:
        if place.callee is None:
            yield _replaced(source.text, place.span, ", ".join(needs[place.word][place.function]))
        elif place.function not in holes:  # else its body is replaced as a whole
            names = needs[place.word].get(place.callee, ())
            yield _replaced(source.text, place.span, ", ".join(f"{n}={n}" if place.is_keyword else n for n in names))


def _span(text: str, node: ast.AST) -> Span:
    starts = _line_starts(text)
    lines = text.splitlines()

    def at(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


@cache
def _line_starts(text: str) -> tuple[int, ...]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return tuple(starts)


def _replaced(text: str, span: Span, new: str) -> Edit:
    """One of a comma list replaced; with its comma where nothing comes in its place."""
    first, end = span
    if new:
        return first, end, new
    behind = re.match(r"\s*,[^\S\n]*", text[end:])
    if behind:
        return first, end + behind.end(), ""
    before = re.search(r",\s*$", text[:first])
    return (before.start() if before else first), end, ""


def _body_edit(source: _Source, name: str, body: str) -> Edit:
    """The statements of a hole behind its docstring, replaced."""
    function = source.functions[name]
    has_doc = ast.get_docstring(function) is not None
    old = function.body[1:] if has_doc else function.body
    lines = textwrap.indent(body, "    ").lstrip()
    if not old:
        _, end = _span(source.text, function.body[0])
        return end, end, f"\n    {lines}"
    return _span(source.text, old[0])[0], _span(source.text, old[-1])[1], lines


def _leave_out(source: _Source, holes: Mapping[str, str], kernels: Sequence[str] | None) -> Iterator[Edit]:
    """Functions and constants that nothing reaches, and the list of holes."""
    absent = [name for name in kernels or () if name not in source.functions]
    if absent:
        raise LoweringError(f"render the kernels {', '.join(absent)}: the skeleton has {', '.join(source.functions)}.")
    reached: set[str] = set()
    waiting = list(source.functions if kernels is None else kernels)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            used = _names_in(_parsed(holes[name])) if name in holes else source.uses[name]
            waiting += used & source.uses.keys()
    for name, node in (*source.functions.items(), *source.constants.items()):
        if name not in reached:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            starts = _line_starts(source.text)
            yield starts[first - 1], starts[node.end_lineno], ""  # type: ignore[index]


def _apply(text: str, edits: Sequence[Edit]) -> str:
    """All edits; one inside a stretch that is left out falls with it."""
    out, at = [], 0
    for first, end, new in sorted(edits, key=lambda e: (e[0], -e[1])):
        if first >= at:
            out += [text[at:first], new]
            at = end
        elif end > at and not new:  # neighbours that both go share their comma
            at = end
    text = "".join([*out, text[at:]])
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    return re.sub(r"(\"\"\"|\n)\n{3,}(?=[A-Z])", r"\1\n\n", text).rstrip() + "\n"


def _shortened(text: str) -> str:
    """Lines that expansion made too long, broken behind commas inside brackets."""
    lines = text.splitlines()
    breaks: dict[int, list[tuple[int, int]]] = {}
    depth = 0
    opened: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.OP:
            opened.setdefault(token.start[0], depth)
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == "," and depth:
                breaks.setdefault(token.start[0], []).append((token.end[1], depth))
    out = []
    for number, line in enumerate(lines, 1):
        indent = re.match(r"\s*", line)[0] + ("    " if opened.get(number, 0) == 0 else "")  # type: ignore[index]
        shift = 0
        while len(line) > WIDTH and (fits := [c - shift for c, _ in breaks.get(number, ()) if 60 < c - shift <= WIDTH]):
            out.append(line[: fits[-1]])
            rest = line[fits[-1] :].lstrip()
            shift += len(line) - len(rest) - len(indent)
            line = indent + rest
        out.append(line)
    return "\n".join(out) + "\n"


def _header(skeleton: str, spelling: str, device: str) -> str:
    words = f"{spelling}\nfor {device}, by attnc {__version__} from skeleton {source_hash(skeleton)}"
    lines = [part for line in words.splitlines() for part in textwrap.wrap(line, WIDTH - 2)]
    return "".join(f"# {line}\n" for line in lines)
