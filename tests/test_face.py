"""The face: every public name resolves, and importing it costs almost nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import attnc

HEAVY = ("sympy", "networkx", "triton", "optuna", "rich", "typer", "transformers", "torch")

MEASURE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import attnc
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_face_is_light_beside_torch():
    runs = [json.loads(run_python("-c", MEASURE)) for _ in range(2)]
    loaded = set(runs[0][1])
    assert not {m for m in loaded for heavy in HEAVY if m == heavy or m.startswith(heavy + ".")}
    assert not {m for m in loaded if m.startswith("attnc.")}, "the face loads a module before it is used"
    assert min(seconds for seconds, _ in runs) < 0.15


def test_importing_the_face_does_not_import_torch():
    assert run_python("-c", "import sys, attnc; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("name", [n for n in attnc.__all__ if n != "__version__"])
def test_every_public_name_resolves(name):
    value = getattr(attnc, name)
    assert value is getattr(sys.modules[attnc._HOME[name]], name)
    assert value.__module__ == attnc._HOME[name]
    assert value.__doc__


def test_table_list_and_dir_agree():
    assert set(attnc.__all__) == {*attnc._HOME, "__version__"}
    assert set(attnc.__all__) <= set(dir(attnc))
    namespace: dict[str, object] = {}
    exec("from attnc import *", namespace)
    assert set(attnc.__all__) <= namespace.keys()


def test_the_type_checker_sees_the_same_names():
    source = Path(attnc.__file__).read_text(encoding="utf-8")
    seen = source.split("if TYPE_CHECKING:")[1].split("__version__")[0]
    for name, home in attnc._HOME.items():
        lines = [line for line in seen.splitlines() if line.strip().startswith(f"from {home} import")]
        assert len(lines) == 1
        assert name in lines[0].split("import ")[1].split(", ")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'attnc' has no attribute 'explane'"):
        attnc.explane  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert Path(attnc.__file__).with_name("py.typed").exists()


def test_every_package_of_the_wheel_is_found():
    for package in ("attnc.forms", "attnc.passes", "attnc.codegen", "attnc.cost_models"):
        assert importlib.util.find_spec(package) is not None, package


def test_version_is_the_installed_one():
    assert version("attnc") == attnc.__version__


def test_torch_finds_the_backend_by_its_entry_point():
    (found,) = entry_points(group="torch_dynamo_backends", name="attnc")
    assert found.value == "attnc.backend:attnc_backend"
    assert callable(found.load())


def test_the_console_script_and_the_module_are_the_same_program():
    (script,) = entry_points(group="console_scripts", name="attnc")
    assert script.value == "attnc.cli:main"
    assert callable(script.load())
    assert "explain" in run_python("-m", "attnc", "--help")
