"""Hooks: a library's loop becomes one operator for attnc, and nothing changes for anyone else."""

from __future__ import annotations

import functools
import importlib
import itertools
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import attnc
from attnc import graphs
from attnc.backend import attnc_backend
from attnc.observe import Reader
from attnc.passes.hooks import table as hooks
from attnc.passes.hooks.hook import Hook
from tests.tolerance import assert_close

COUNT = itertools.count()
LIBRARY = """
import functools

import torch


def slow(x, steps=5):
    for i in range(steps):
        x = x * 1.5
    return x


def decorated(function):
    def choose(implementation):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return implementation(*args, **kwargs)
        return wrapper
    return choose(function)


wrapped = decorated(slow)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def scan(self, x):
        for i in range(3):
            x = self.linear(x).sin()
        return x

    def forward(self, x):
        return self.scan(x) + slow(x) + wrapped(x, 2)
"""


def fast(x: Tensor, steps: int = 5) -> Tensor:
    return x * 1.5**steps


def wrong(x: Tensor, steps: int = 5) -> Tensor:
    return x * 1.4**steps


def small(arguments, g: torch.Generator) -> dict:
    return {**arguments, "x": torch.randn(3, generator=g).to(arguments["x"].dtype).requires_grad_()}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A library whose `slow` is in the table; under a new name each time, since Dynamo remembers modules by name."""
    name = f"looplib{next(COUNT)}"
    module = types.ModuleType(name)
    exec(LIBRARY, module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    table(monkeypatch, Hook("looplib*", "slow", fast, small, home=name))
    return module


def table(monkeypatch: pytest.MonkeyPatch, *rows: Hook) -> None:
    monkeypatch.setattr(hooks, "HOOKS", rows)
    monkeypatch.setattr(hooks, "_VERDICTS", {})


def seen_by(model: Callable[..., Tensor], *inputs: Tensor, how: Callable | None = None) -> tuple[list[str], Tensor]:
    """The graphs that a compiler which is not attnc is given, and the result."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def record(gm: torch.fx.GraphModule, given: list) -> Callable:
        graphs.append(gm.print_readable(print_output=False))
        return gm.forward if how is None else how(gm, given)

    return graphs, torch.compile(model, backend=record)(*inputs)


def with_attnc(model: Callable[..., Tensor], *inputs: Tensor, **options: object) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="attnc", options={"inner": "eager", **options})(*inputs)


# Inert for everyone else.


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_other_compilers_get_the_same_graphs_before_and_after(library: types.ModuleType, inner: str) -> None:
    model, x = library.Block(), torch.randn(2, 4)
    how = None if inner == "eager" else torch._dynamo.lookup_backend(inner)
    before, first = seen_by(model, x, how=how)
    own = with_attnc(model, x)
    after, second = seen_by(model, x, how=how)
    assert before == after and before[0].count("* 1.5") == 7
    assert torch.equal(first, second)
    assert_close(own, model(x))


PROCESS = """
import sys
import types
import torch
library = sys.modules["looplib"] = types.ModuleType("looplib")
exec(sys.argv[1], library.__dict__)
torch.manual_seed(0)
model, x = library.Block(), torch.ones(2, 4)
if len(sys.argv) > 2:
    from attnc.passes.hooks import table as hooks
    from attnc.passes.hooks.hook import Hook
    hooks.HOOKS = (Hook("looplib", "slow", lambda x, steps=5: x * 1.5**steps, lambda given, g: {"x": torch.ones(3)}),)
    lengths = torch.compile(model, backend="attnc", options={"inner": "eager"})(x)
    assert hooks._VERDICTS == dict.fromkeys(hooks._VERDICTS, "") and hooks._VERDICTS
    torch._dynamo.reset()
graphs = []
def record(gm, given):
    graphs.append(gm.print_readable(print_output=False))
    return gm.forward
print(repr((graphs, torch.compile(model, backend=record)(x).tolist())))
"""


def test_a_process_that_used_attnc_first_gets_the_graphs_of_one_that_never_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    never = subprocess.run([sys.executable, "-c", PROCESS, LIBRARY], capture_output=True, text=True, check=True)
    table(monkeypatch)  # this process is the one that did
    monkeypatch.setattr(sys, "argv", ["-c", LIBRARY, "attnc"])
    monkeypatch.setitem(sys.modules, "looplib", types.ModuleType("looplib"))
    exec(PROCESS, {"__name__": "__main__"})
    assert capsys.readouterr().out == never.stdout and "1.5" in never.stdout


def test_the_library_itself_is_untouched(library: types.ModuleType) -> None:
    names = ("slow", "wrapped", "Block")
    before = [vars(library)[n] for n in names], library.slow.__code__, dict(vars(library.Block))
    with_attnc(library.Block(), torch.randn(2, 4))
    assert ([vars(library)[n] for n in names], library.slow.__code__, dict(vars(library.Block))) == before


def test_installing_twice_or_reloading_registers_once() -> None:
    entrance = hooks.InstructionTranslatorBase.inline_user_function_return
    hooks.install()
    importlib.reload(hooks)
    hooks.install()
    assert hooks.InstructionTranslatorBase.inline_user_function_return is entrance
    assert not hasattr(entrance.__wrapped__, hooks.MARK)


def test_a_torch_without_the_entrance_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hooks.InstructionTranslatorBase, "inline_user_function_return")
    hooks.install()
    assert "loops of libraries are read as they are written" in hooks.notes()[0]


def test_attnc_is_known_under_what_wraps_it() -> None:
    @functools.wraps(attnc_backend)
    def counting(gm, given):
        return attnc_backend(gm, given)

    ours = [
        attnc_backend,
        functools.partial(attnc_backend, options={}),
        counting,
        lambda gm, given: attnc_backend(gm, given),
        Reader(torch.nn.Linear(2, 2), lambda gm, given, place: gm.forward).compile,
        torch._TorchCompileWrapper("attnc", None, {"inner": "eager"}, False),
    ]
    theirs = [torch._dynamo.lookup_backend("inductor"), lambda gm, given: gm.forward, print, None]
    assert all(map(hooks.is_ours, ours)) and not any(map(hooks.is_ours, theirs))


# What attnc's own traces hold.


def test_functions_methods_partials_and_wrappers_are_met(
    library: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scanned(self, x: Tensor) -> Tensor:
        return torch.cosh(x)

    same = Hook("looplib*", "Block.scan", scanned, lambda arguments, g: {})
    monkeypatch.setattr(Hook, "disagreement", lambda *args: "")
    table(monkeypatch, *hooks.HOOKS, same)
    model, held = library.Block(), functools.partial(library.slow, steps=4)
    x = torch.randn(2, 4)
    out = with_attnc(lambda x: model(x) + held(x), x)
    assert_close(out, torch.cosh(x) + x * (1.5**5 + 1.5**2 + 1.5**4))


def test_explain_reads_the_substituted_graph(library: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    entrance = graphs.analyse

    def reading(gm, *rest):
        lengths.append(len(gm.graph.nodes))
        return entrance(gm, *rest)

    monkeypatch.setattr(graphs, "analyse", reading)
    attnc.explain(library.slow, torch.randn(3))
    assert lengths == [3]


# Trouble.


def test_a_substitute_that_differs_is_not_used(library: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, Hook("looplib*", "slow", wrong, small))
    model, x = library.Block(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="attnc", options={"inner": "aot_eager"})
    with pytest.warns(UserWarning, match=r"looplib\d+\.slow as one operator.*differs") as caught:
        assert_close(compiled(x), model(x))
    assert len([w for w in caught if "looplib" in str(w.message)]) == 2  # with 5 steps and with 2
    report = attnc.last_report(compiled)
    assert "as it is" in report.unmatched[0].reason and ".slow as one operator" in report.problems[0]


def test_a_call_that_is_refused_is_traced_as_it_is(library: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arguments) -> str | None:
        return "five steps are one too many" if arguments["steps"] == 5 else None

    table(monkeypatch, Hook("looplib*", "slow", fast, small, refuse=refuse))
    model = library.Block()
    report = attnc.explain(model, torch.randn(2, 4))
    assert [u.reason for u in report.unmatched] == ["slow is traced as it is: five steps are one too many"]


def test_arguments_that_cannot_be_compared_leave_the_original(
    library: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(arguments, g: torch.Generator) -> dict:
        raise KeyError("x")

    table(monkeypatch, Hook("looplib*", "slow", fast, broken))
    model, x = library.Block(), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(with_attnc(model, x), model(x))


def test_the_comparison_draws_nothing_from_the_random_streams(library: types.ModuleType) -> None:
    before = torch.get_rng_state()
    attnc.explain(library.slow, torch.randn(3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_names_that_are_gone_are_a_line_of_the_report(
    library: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Hook("looplib*", "slower", fast, small, home=library.__name__)
    unloaded = Hook("otherlib", "slow", fast, small, home="otherlib")
    table(monkeypatch, *hooks.HOOKS, gone, unloaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(library.Block(), backend="attnc", options={"inner": "eager"})
        compiled(torch.randn(2, 4))
    report = attnc.last_report(compiled)
    (note,) = (x for x in report.notes if library.__name__ in x)  # other libraries of this process have their own
    assert note.startswith(f"hook slower: {library.__name__}")
    assert note in report.to_text(200) and report.from_json(report.to_json()).notes == report.notes


def test_an_op_that_another_library_supplies_is_named_and_left_to_it(library: types.ModuleType) -> None:
    def kernel(x: Tensor, steps: int = 5) -> Tensor:
        return x * 1.5**steps

    kernel.__module__ = "kernels.hub"
    note = f"hook slow: in {library.__name__} it is supplied by kernels.hub; its calls are left to it"
    model, x = library.Block(), torch.randn(2, 4)
    library.wrapped.__closure__[0].cell_contents = kernel  # as transformers picks fla's or a hub's kernel
    report = attnc.explain(model, x)
    assert [u.anchor for u in report.unmatched] == ["slow"]
    assert ".slow is supplied by another library" in report.unmatched[0].reason
    for patch in (library.wrapped, kernel):
        library.slow = patch
        assert attnc.explain(model, x).notes == (note,)
        assert_close(with_attnc(model, x), model(x))


def test_an_op_that_a_library_of_the_table_supplies_is_substituted(
    library: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = types.ModuleType(f"kernels{next(COUNT)}")
    exec(LIBRARY, kernels.__dict__)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    table(monkeypatch, *hooks.HOOKS, Hook("kernels*", "slow", fast, small))
    library.wrapped.__closure__[0].cell_contents = kernels.slow
    report = attnc.explain(lambda x: library.wrapped(x, 2), torch.randn(2, 4))
    assert not report.unmatched and not report.notes


@pytest.fixture(autouse=True)
def table_restored() -> Iterator[None]:
    yield
    hooks._rows.cache_clear()
