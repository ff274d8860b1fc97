"""The law of the house (shared/DESIGN.md, section 3), enforced by walking syntax trees.

Each rule reads the parsed files and yields one sentence per violation. The same rules are run on small
planted trees, so that a rule that stopped looking is noticed.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.house_layers import LAYERS, NEIGHBOURS

ROOT = Path(__file__).resolve().parent.parent

# Room -> layer; a room is a module or a package with all it holds. Imports point down, or stay in the layer.
PACKAGES = {
    "attnc": "attnc",
    "passes": "attnc.passes",
    "codegen": "attnc.codegen",
    "cost_models": "attnc.cost_models",
}
SIZED = ("tests", "benchmarks", "examples")  # held to the size and name rules only
OPTIONAL = {"triton", "onnx", "onnxruntime", "onnxscript", "plotly", "transformers"}
FACE = "attnc"
# These may import a name that is only known when it runs.
LOADS_BY_NAME = {FACE, "attnc.commands.target", "attnc.commands.loading"}
PRINTS = {"attnc.cli", "attnc.__main__"}
ENVIRONMENT = {"attnc.options"}
BANNED = {"util", "utils", "helper", "helpers", "common", "misc"}
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 60, 120


@dataclass(frozen=True)
class Import:
    """One imported module: where, whether at module level, whether only for the type checker."""

    target: str
    line: int
    top: bool
    typing: bool
    by_name: bool = False


@dataclass(frozen=True)
class Source:
    """One parsed file; `module` is None outside the packages."""

    path: str
    module: str | None
    text: str
    tree: ast.Module

    @property
    def is_skeleton(self) -> bool:
        return (self.module or "").startswith("attnc.codegen.skeletons.")


@dataclass(frozen=True)
class House:
    root: Path
    sources: tuple[Source, ...]

    @property
    def package(self) -> tuple[Source, ...]:
        return tuple(s for s in self.sources if s.module)


@cache
def parse(root: Path) -> House:
    sources = []
    for folder in (*PACKAGES, *SIZED):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((PACKAGES.get(folder, ""), *parts)).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            module = name if folder in PACKAGES else None
            sources.append(Source(str(path.relative_to(root)), module, text, ast.parse(text)))
    return House(root, tuple(sources))


class Imports(ast.NodeVisitor):
    """Collect what a file imports, calls of importlib included."""

    def __init__(self, module: str, is_package: bool, known: set[str]) -> None:
        self.module, self.is_package, self.known = module, is_package, known
        self.found: list[Import] = []
        self.depth, self.typing = 0, False

    def visit(self, node: ast.AST) -> None:
        nested = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef)
        self.depth += nested
        super().visit(node)
        self.depth -= nested

    def add(self, target: str, node: ast.AST, by_name: bool = False) -> None:
        self.found.append(Import(target, node.lineno, self.depth == 0, self.typing, by_name))  # type: ignore[attr-defined]

    def visit_If(self, node: ast.If) -> None:
        before = self.typing
        self.typing = before or "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body:
            self.visit(child)
        self.typing = before
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            up = node.level - self.is_package
            base = ".".join([*self.module.split(".")[: None if up == 0 else -up], *filter(None, [base])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            if inner == f"{FACE}.__version__":
                continue  # a literal on the face, which is loaded by then whatever the importer
            self.add(inner if inner in self.known or inner in LAYERS else base, node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called in ("__import__", "import_module", "importlib.import_module") and node.args:
            name = node.args[0]
            constant = isinstance(name, ast.Constant) and isinstance(name.value, str)
            self.add(name.value if constant else "?", node, by_name=not constant)  # type: ignore[attr-defined]
        self.generic_visit(node)


def imports(source: Source, house: House) -> list[Import]:
    known = {s.module for s in house.package}
    collector = Imports(source.module or "", source.path.endswith("__init__.py"), known)
    collector.visit(source.tree)
    return collector.found


def room_of(module: str) -> str | None:
    """The longest room that holds the module; the face holds nothing but itself."""
    rooms = [r for r in LAYERS if module == r or (r != FACE and module.startswith(r + "."))]
    return max(rooms, key=len, default=None)


def is_ours(target: str) -> bool:
    return target == FACE or target.startswith(FACE + ".")


def layers(house: House) -> Iterator[str]:
    """Imports point down; neighbours do not know each other; every module has a place."""
    for source in house.package:
        here = room_of(source.module)
        if here is None:
            yield f"{source.path}: has no layer; give it one in DESIGN.md and in LAYERS"
            continue
        for found in imports(source, house):
            place, there = f"{source.path}:{found.line}", room_of(found.target)
            if not is_ours(found.target) or source.module == FACE:
                continue
            if there is None:
                yield f"{place}: imports {found.target}, which has no layer"
            elif LAYERS[there] > LAYERS[here]:
                yield f"{place}: layer {LAYERS[here]} imports up, {found.target} in {LAYERS[there]}"
            elif there != here and LAYERS[there] == LAYERS[here] and LAYERS[here] in NEIGHBOURS:
                yield f"{place}: {here} imports its neighbour {there}"


def cycles(house: House) -> Iterator[str]:
    """No module needs, directly or through others, one that needs it."""
    graph = {
        s.module: {i.target for i in imports(s, house) if i.top and not i.typing and i.target != s.module}
        for s in house.package
        if s.module != FACE
    }
    try:
        TopologicalSorter({m: t & graph.keys() for m, t in graph.items()}).prepare()
    except CycleError as found:
        yield "import cycle: " + " <- ".join(found.args[1])


def hidden_imports(house: House) -> Iterator[str]:
    """Imports stand at the top, but in the lazy face and in one gateway per optional package."""
    gateways: dict[str, set[str]] = defaultdict(set)
    for source in house.package:
        for found in imports(source, house):
            place, package = f"{source.path}:{found.line}", found.target.split(".")[0]
            if found.by_name:
                if source.module not in LOADS_BY_NAME:
                    yield f"{place}: imports a module by a computed name"
            elif found.top:
                lawful = found.typing or (source.is_skeleton and package == "triton")
                if package in OPTIONAL and not lawful:
                    yield f"{place}: imports optional {package} at the top, not in its gateway's function"
            elif package in OPTIONAL:
                gateways[package].add(source.path)
            elif source.module != FACE:
                yield f"{place}: imports {found.target} below module level"
    for package, files in gateways.items():
        if len(files) > 1:
            yield f"optional {package} has {len(files)} gateways: {', '.join(sorted(files))}"


def full_names(house: House) -> Iterator[str]:
    """Modules are imported by their full name: the folders on disk are not those of the package."""
    for source in house.package:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{source.path}:{node.lineno}: relative import; write the full name"
        for found in imports(source, house):
            if found.target.split(".")[0] in PACKAGES.keys() - {FACE}:
                yield f"{source.path}:{found.line}: imports {found.target}; its name is attnc.{found.target}"


def sizes(house: House) -> Iterator[str]:
    """Files and functions stay small enough to be read at once."""
    for source in house.sources:
        lines = len(source.text.splitlines())
        if lines > MAX_FILE:
            yield f"{source.path}: {lines} lines, allowed are {MAX_FILE}"
        allowed = MAX_KERNEL if source.is_skeleton else MAX_FUNCTION
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > allowed:
                    yield f"{source.path}:{node.lineno}: {node.name} has {lines} lines, allowed are {allowed}"


def docstrings(house: House) -> Iterator[str]:
    """Every module says what it is; every form file cites its source."""
    for source in house.package:
        text = ast.get_docstring(source.tree) or ""
        if not text:
            yield f"{source.path}: has no docstring"
        is_form = source.module.startswith("attnc.forms.") and source.module != "attnc.forms.base"
        if is_form and not re.search(r"^Source:\s*\S", text, re.MULTILINE):
            yield f"{source.path}: cites no `Source:` in its docstring"


def names(house: House) -> Iterator[str]:
    """A file is named after its concept."""
    for source in house.sources:
        for part in Path(source.path).with_suffix("").parts:
            if BANNED & set(part.lower().split("_")):
                yield f"{source.path}: {part!r} says nothing; name the concept"


def prints(house: House) -> Iterator[str]:
    """Only the command line prints."""
    for source in house.package:
        for node in ast.walk(source.tree):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print" and source.module not in PRINTS:
                yield f"{source.path}:{node.lineno}: prints; log, or return the text"


def environment(house: House) -> Iterator[str]:
    """Only the options read the environment."""
    reads = {"environ", "environb", "getenv", "getenvb"}
    for source in house.package:
        for node in ast.walk(source.tree):
            read = isinstance(node, ast.Attribute) and node.attr in reads
            taken = isinstance(node, ast.ImportFrom) and reads & {a.name for a in node.names}
            if (read or taken) and source.module not in ENVIRONMENT:
                yield f"{source.path}:{node.lineno}: reads the environment; make it a field of Options"


def packaging(house: House) -> Iterator[str]:
    """Every folder of modules is a package, and the wheel holds it."""
    project = house.root / "pyproject.toml"
    listed = project.read_text(encoding="utf-8") if project.exists() else ""
    modules = {s.module: s for s in house.package}
    for folder in sorted({str(Path(s.path).parent) for s in house.package}):
        top, *rest = Path(folder).parts
        package = ".".join((PACKAGES[top], *rest))
        if package not in modules or not modules[package].path.endswith("__init__.py"):
            yield f"{folder}: has no __init__.py"
        if f'"{package}",' not in listed:
            yield f"{folder}: {package} is not among the packages of pyproject.toml"


RULES: tuple[Callable[[House], Iterator[str]], ...] = (
    layers,
    cycles,
    hidden_imports,
    full_names,
    sizes,
    docstrings,
    names,
    prints,
    environment,
    packaging,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_keeps(rule: Callable[[House], Iterator[str]]) -> None:
    violations = list(rule(parse(ROOT)))
    assert not violations, f"{rule.__doc__}\n" + "\n".join(violations)


def planted(root: Path, files: dict[str, str]) -> House:
    """A small lawful house with `files` added, each under a docstring."""
    lawful = {f"{folder}/__init__.py": "" for folder in PACKAGES} | {
        "attnc/forms/__init__.py": "",
        "attnc/region.py": "from attnc.errors import AttncError",
        "attnc/errors.py": "",
        "attnc/store.py": "from attnc import __version__\nif TYPE_CHECKING:\n    from attnc.region import R",
        "attnc/options.py": "import os\nSTORE = os.environ.get('ATTNC_STORE')",
        "attnc/cli.py": "import attnc\nprint(1)",
        "attnc/commands/__init__.py": "",
        "attnc/commands/target.py": "def load(name): return importlib.import_module(name)",
        "codegen/load.py": "def load():\n    import triton\n    return triton",
    }
    for path, text in (lawful | files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        documented = text if text.startswith(('"""', "#")) else f'"""What it is."""\n{text}'
        (root / path).write_text(documented, encoding="utf-8")
    rooms = (*PACKAGES.values(), "attnc.commands", "attnc.forms", "attnc.codegen.skeletons")
    listed = "".join(f'"{room}",\n' for room in rooms)
    (root / "pyproject.toml").write_text(listed, encoding="utf-8")
    return parse(root)


def test_a_lawful_house_breaks_no_rule(tmp_path: Path) -> None:
    kernel = "import triton\ndef kernel():\n" + "    x = 1\n" * 110
    form = '"""A form.\n\nSource: a paper.\n"""\nfrom attnc.region import Region\n'
    skeleton = {"codegen/skeletons/__init__.py": "", "codegen/skeletons/flash.py": kernel}
    house = planted(tmp_path, {"attnc/forms/dense.py": form, "attnc/forms/base.py": "", **skeleton})
    assert [v for rule in RULES for v in rule(house)] == []


PLANTED = [
    (layers, "attnc/region.py", "from attnc.passes import masks", "imports up"),
    (layers, "attnc/errors.py", "if TYPE_CHECKING:\n    from attnc import region", "imports up"),
    (layers, "attnc/region.py", "def f():\n    importlib.import_module('attnc.forms.dense')", "imports up"),
    (layers, "attnc/region.py", "from attnc import explain", "imports up"),
    (layers, "passes/lift.py", "from attnc.tuning.search import tune", "neighbour"),
    (layers, "codegen/render.py", "import attnc.cost_models.roofline", "neighbour"),
    (layers, "codegen/render.py", "from ..forms import dense", "imports up"),
    (layers, "attnc/corner.py", "", "has no layer"),
    (layers, "attnc/plan.py", "from attnc.corner import x", "no layer"),
    (cycles, "attnc/errors.py", "from attnc.region import Region", "import cycle"),
    (hidden_imports, "attnc/region.py", "def f():\n    import json", "below module level"),
    (hidden_imports, "attnc/region.py", "class C:\n    from attnc.errors import E", "below module level"),
    (hidden_imports, "attnc/region.py", "def f():\n    return __import__('json')", "below module level"),
    (hidden_imports, "attnc/region.py", "def f(name):\n    return import_module(name)", "computed name"),
    (hidden_imports, "codegen/render.py", "def f():\n    import triton.language", "2 gateways"),
    (hidden_imports, "codegen/render.py", "import triton", "at the top"),
    (hidden_imports, "attnc/store.py", "try:\n    import onnx\nexcept ImportError:\n    pass", "at the top"),
    (full_names, "passes/lift.py", "from . import masks", "relative"),
    (full_names, "passes/lift.py", "from passes.masks import lift", "attnc.passes.masks"),
    (sizes, "tests/test_long.py", "x = 1\n" * 400, "401 lines"),
    (sizes, "benchmarks/long.py", "def f():\n" + "    x = 1\n" * 60, "61 lines"),
    (docstrings, "attnc/forms/dense.py", "def dense(): ...", "cites no"),
    (docstrings, "attnc/report.py", "# Source\n", "has no docstring"),
    (names, "passes/graph_utils.py", "", "name the concept"),
    (names, "tests/helpers/x.py", "", "name the concept"),
    (prints, "attnc/report.py", "def show():\n    print(1)", "prints"),
    (environment, "codegen/render.py", "import os as o\nx = o.environ['HOME']", "reads the environment"),
    (environment, "codegen/render.py", "from os import getenv", "reads the environment"),
    (packaging, "attnc/tuning/search.py", "", "not among the packages"),
    (packaging, "attnc/tuning/search.py", "", "no __init__"),
]


@pytest.mark.parametrize(("rule", "path", "text", "says"), PLANTED)
def test_a_planted_violation_is_caught(tmp_path: Path, rule, path: str, text: str, says: str) -> None:
    found = list(rule(planted(tmp_path, {path: text})))
    assert any(says in violation for violation in found), found
