"""The command line: a report or JSON for who asks rightly, one sentence and exit code 2 for who does not."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attnc
import attnc.commands.explain as explain_command
from attnc.cli import COMMANDS, app
from attnc.commands.loading import command
from attnc.commands.target import IDS_BELOW, _input_spec
from attnc.errors import UsageError
from attnc.report_json import SCHEMA_ID

FACTORIES = """
import torch
from torch import nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 8)

    def forward(self, ids, causal=True):
        print("the model talks")
        x = self.embed(ids) if not ids.is_floating_point() else ids
        return F.scaled_dot_product_attention(x, x, x, is_causal=causal)


READY = Attention()
IDS = torch.zeros(1, 33, dtype=torch.int64)
NUMBER = 3


class Zoo:
    build = staticmethod(Attention)


def bare(): return Attention()
def with_args(): return Attention(), (IDS,)
def with_kwargs(): return Attention(), {"ids": IDS}
def with_both(): return Attention(), [IDS], {"causal": False}
def function(): return F.scaled_dot_product_attention, (torch.randn(1, 2, 7, 4),) * 3
def exported(): return torch.export.export(Attention(), (IDS,))
def nothing(): return None
def too_many(): return Attention(), (IDS,), {}, 5
def wrong(): return Attention(), 7
def needs(size): return Attention()
def fails(): raise OSError("no weights here.")
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `attnc` in a folder with factories, in this process."""
    (tmp_path / "factories_of_test.py").write_text(FACTORIES, encoding="utf-8")
    (tmp_path / "broken_of_test.py").write_text("import torch\nimport no_such_module\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories_of_test", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    yield lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])
    sys.modules.pop("factories_of_test", None)


def explained(run, factory: str, *arguments: str):
    done = run("explain", f"factories_of_test:{factory}", *arguments)
    assert done.exit_code == 0, done.output
    return done


IDS = ("--input", "ids=1x33:int64")


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        ("bare", IDS),
        ("READY", IDS),
        ("Attention", IDS),
        ("Zoo.build", IDS),
        ("with_args", ()),
        ("with_kwargs", ()),
        ("function", ()),
        ("exported", ()),
    ],
)
def test_every_kind_of_factory_is_explained(run, factory, arguments):
    report = attnc.Report.from_json(explained(run, factory, *arguments, "--json").stdout)
    assert len(report.regions) == 1


def test_the_report_is_a_table(run):
    done = explained(run, "bare", *IDS)
    assert "causal attention" in done.stdout
    assert "Attention on cpu, 1 graph" in done.stdout


def test_arguments_of_the_factory_reach_the_model(run):
    (region,) = attnc.Report.from_json(explained(run, "with_both", "--json").stdout).regions
    assert region.mask == "none"


def test_inputs_of_the_command_line_replace_those_of_the_factory(run):
    text = explained(run, "with_kwargs", "--input", "ids=2x7x16:float32", "--json").stdout
    (region,) = attnc.Report.from_json(text).regions
    assert (region.shape.B * region.shape.Hq, region.shape.L, region.shape.E) == (2, 7, 16)


def test_what_the_model_prints_does_not_spoil_the_json(run):
    done = explained(run, "bare", *IDS, "--json")
    assert json.loads(done.stdout)["schema"] == SCHEMA_ID
    assert "the model talks" not in done.stdout


def test_training_is_asked_for(run):
    modes = [explained(run, "bare", *IDS, "--json", *more).stdout for more in ((), ("--train",))]
    assert [json.loads(text)["regions"][0]["training"] for text in modes] == [False, True]


def test_each_length_gives_a_report(run):
    lengths = ("--length", "33", "--length", "70")
    texts = explained(run, "bare", "--input", "ids=1xL:int64", *lengths, "--json").stdout
    assert [r["regions"][0]["shape"]["L"] for r in json.loads(texts)] == [33, 70]
    table = explained(run, "bare", "--input", "ids=1xL:int64", *lengths).stdout
    assert "33 x 33" in table
    assert "L=70: Attention on cpu" in table


def test_the_store_that_is_named_is_the_one_that_is_asked(run, tmp_path, monkeypatch):
    stores = []
    monkeypatch.setattr(explain_command, "explain", lambda *args, options, **kwargs: stores.append(options.store))
    for more in ((), ("--store", "there")):
        run("explain", "factories_of_test:bare", *IDS, *more)
    assert stores == [attnc.Options().store, str(tmp_path / "there")]


MISTAKES = [
    (("factories_of_test",), "found no name of the form package.module:factory"),
    ((":bare",), "found no name of the form package.module:factory"),
    (("no_such_module:bare",), "importing no_such_module raised ModuleNotFoundError"),
    (("broken_of_test:bare",), "importing broken_of_test raised ModuleNotFoundError: No module named 'no_such_module'"),
    (("factories_of_test:bear",), "found no 'bear' in factories_of_test, which has"),
    (("factories_of_test:bear",), "Did you mean 'bare'?"),
    (("factories_of_test:Zoo.birth",), "found no 'birth' in Zoo, which has build"),
    (("factories_of_test:NUMBER",), "found int, allowed is a function that returns the model"),
    (("factories_of_test:fails",), "calling fails() raised OSError: no weights here. Correct it"),
    (("factories_of_test:needs",), "calling needs() raised TypeError: needs() missing 1 required"),
    (("factories_of_test:nothing",), "it returned NoneType; allowed are a model, (model, args)"),
    (("factories_of_test:wrong",), "it returned (Attention, int)"),
    (("factories_of_test:too_many",), "it returned (Attention, tuple, dict, int)"),
    (("factories_of_test:bare",), "missing 1 required positional argument: 'ids'"),
    (("factories_of_test:bare", *IDS, "--input", "idz=1:int64"), "got an unexpected keyword argument 'idz'"),
    (("factories_of_test:bare", "--input", "ids"), "found no input of the form NAME=SHAPE:DTYPE"),
    (("factories_of_test:bare", "--input", "ids=1,128:int64"), "found no input of the form NAME=SHAPE:DTYPE"),
    (("factories_of_test:bare", "--input", "ids=1x128"), "found no input of the form NAME=SHAPE:DTYPE"),
    (("factories_of_test:bare", "--input", "ids=1x128:int46"), "Did you mean 'int64'?"),
    (("factories_of_test:bare", "--input", "ids=1x128:int64<0"), "allowed is a bound of at least 1"),
    (("factories_of_test:bare", "--input", "ids=1x128:float32<9"), "found the bound 9 for float32"),
    (("factories_of_test:bare", *IDS, *IDS), "--input ids=...: given 2 times, allowed is once"),
    (("factories_of_test:bare", "--input", "ids=1xL:int64"), "found L in the shape, but no length"),
    (("factories_of_test:bare", *IDS, "--length", "33"), "--length 33: found no L in the shape"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_a_sentence_and_exit_code_two(run, arguments, says):
    done = run("explain", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    spoken = [line for line in done.stderr.splitlines() if line != "the model talks"]
    assert len(spoken) == 1, done.stderr
    assert spoken[0].startswith("attnc: ")
    assert says in spoken[0]
    assert "Traceback" not in done.stderr


def test_debug_shows_where(run):
    done = run("explain", "factories_of_test:fails", "--debug")
    assert isinstance(done.exception, UsageError)
    assert isinstance(done.exception.__cause__, OSError)


@pytest.mark.parametrize(
    "arguments", [("explane",), ("explain",), ("explain", "a:b", "--jsn"), ("explain", "a:b", "--length", "0")]
)
def test_a_wrong_command_or_option_is_exit_code_two(run, arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("x=3:float32", (3,), torch.float32),
        ("x=2x3x4:bfloat16", (2, 3, 4), torch.bfloat16),
        ("x=1xL:float16", (1, 70), torch.float16),
        ("x=5x5:bool", (5, 5), torch.bool),
        ("x=0x3:int32", (0, 3), torch.int32),
    ],
)
def test_an_input_is_drawn_as_written(text, shape, dtype):
    drawn = _input_spec(text).draw(70)
    assert (tuple(drawn.shape), drawn.dtype) == (shape, dtype)


def test_integers_stay_below_their_bound():
    assert 2 < int(_input_spec("x=1000:int64").draw(None).max()) < IDS_BELOW
    assert int(_input_spec("x=1000:int64<3").draw(None).max()) == 2


def test_the_version_is_printed_by_the_module():
    done = subprocess.run([sys.executable, "-m", "attnc", "--version"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"attnc {attnc.__version__}\n")


@pytest.mark.parametrize("words", [("--help",), ("devices",), ("devices", "h100", "--json"), ("--version",)])
def test_help_and_devices_do_not_import_torch(words):
    code = "import sys\nfrom attnc.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
    code += "print('imported', *(m for m in ('torch', 'optuna', 'attnc.options') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "imported", done.stdout[-200:] + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_line_of_the_help_is_the_first_of_the_command(name):
    assert inspect.getdoc(command(name)).splitlines()[0] == COMMANDS[name]


def test_help_names_the_commands(run):
    assert "explain" in run("--help").stdout
    assert all(f"  {name} " in run("--help").stdout for name in COMMANDS)
    assert run("tune", "--help").stdout.startswith("Usage: attnc tune [OPTIONS] ")
    assert "Did you mean 'explain'" in run("explane").stderr
    assert "NAME=SHAPE:DTYPE" in run("explain", "--help").stdout


MINE = """[mine]
title = "H100 at half its clock"
like = "h100"
clock_hz = 0.99e9
tensor_clock_hz = 0.915e9
source = { figures = "nvidia-smi" }
"""


def test_choices_are_made_for_a_device_of_a_file(run, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(MINE)
    for asked in ("own.toml", tmp_path / "own.toml:mine"):
        shown = explained(run, "bare", *IDS, "--device", asked, "--json")
        assert json.loads(shown.stdout)["device"] == "mine"
    assert "Did you mean 'mine'" in run("explain", "factories_of_test:bare", *IDS, "--device", "own.toml:mime").stderr


def test_choices_are_made_for_the_named_device(run) -> None:
    shown = explained(run, "bare", *IDS, "--device", "h100", "--json")
    assert json.loads(shown.stdout)["device"] == "h100"
