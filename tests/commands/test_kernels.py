"""`attnc kernels`: list, show, clear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from attnc.codegen.load import kernel_folder, load
from attnc.codegen.render import source_hash
from attnc.commands import kernels
from attnc.errors import UsageError

TEXT = "# flash{block_m=64}: score=s\nx = 1\n"


@pytest.fixture
def run(tmp_path: Path):
    app = typer.Typer()
    app.command()(kernels.run)
    load.cache_clear()
    load(TEXT, kernel_folder(tmp_path))

    def ran(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--store", str(tmp_path)])

    return ran


def test_a_list_has_hash_size_time_and_title(run) -> None:
    for words in ((), ("list",)):
        first, total = run(*words).output.splitlines()
        assert first.startswith(source_hash(TEXT)[:12]) and first.endswith("flash{block_m=64}: score=s")
        assert total.startswith("1 in ")
    (found,) = json.loads(run("list", "--json").output)
    assert found["hash"] == source_hash(TEXT) and found["bytes"] == len(TEXT)


def test_a_kernel_is_shown_as_it_is(run) -> None:
    assert run("show", source_hash(TEXT)[:5]).output == TEXT


def test_clear_says_what_it_removed(run) -> None:
    assert run("clear").output.startswith(f"removed 1 files, {len(TEXT)} B")
    assert run().output.startswith("no kernels in ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sow",), "Did you mean 'show'"),
        (("show",), "found no hash"),
        (("clear", "abc"), "found the hash 'abc'"),
        (("clear", "--json"), "only list prints JSON"),
        (("show", "zz"), "allowed is one"),
    ],
)
def test_mistakes_are_sentences(run, words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        raise run(*words).exception
