"""The page on fine-tuning: its outputs, flags and code are those of the library."""

import pathlib
import re
import shlex
from typing import Any

import pytest
from support.paths import DOCS

from llama_jax import finetune, plan, sample
from llama_jax.bench.__main__ import main as bench
from llama_jax.cli import finetune_flags as flags
from llama_jax.conversion.__main__ import main as convert
from llama_jax.loading import load

PAGE = DOCS / "finetuning.md"

pytestmark = pytest.mark.skipif(
    not PAGE.is_file(), reason="the documentation is not where the tests are"
)

FILES = {"alpaca.jsonl": 2, "chats.jsonl": 1}
"""Names of the files on the page, and their numbers of records."""


def blocks(kind: str) -> list[str]:
    """The blocks of a kind, in order."""
    text = PAGE.read_text("utf-8") if PAGE.is_file() else ""
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def consoles() -> list[tuple[str, list[str], str]]:
    """Module, arguments and output of each command with an output."""
    commands = []
    for block in blocks("console"):
        command, _, output = block.partition("\n")
        _, _, _, module, *arguments = shlex.split(command)
        commands.append((module, arguments, output))
    return commands


def lines() -> list[list[str]]:
    """The words of every command without an output."""
    text = "".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The working directory, with the files of the page."""
    for (name, count), text in zip(FILES.items(), blocks("json"), strict=True):
        assert text.count("\n") == count
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_batches_are_shown_as_on_the_page(folder: pathlib.Path, capsys: Any) -> None:
    shown = [one for one in consoles() if one[0] == "llama_jax.finetune"]
    assert len(shown) == 2
    for _, arguments, output in shown:
        assert finetune.main(arguments) == 0
        assert capsys.readouterr().out == output


@pytest.mark.parametrize(
    ("arguments", "output"),
    [(a, o) for module, a, o in consoles() if module == "llama_jax.plan"],
)
def test_plans_are_printed_as_on_the_page(
    arguments: list[str], output: str, capsys: Any
) -> None:
    assert plan.main(arguments) == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("words", lines(), ids=" ".join)
def test_commands_on_the_page_have_existing_flags(
    words: list[str], capsys: Any
) -> None:
    assert words[:2] == ["python", "-m"]
    module, arguments = words[2], words[3:]
    mains = {
        "llama_jax.finetune": finetune.main,
        "llama_jax.sample": sample.main,
        "llama_jax.conversion": convert,
        "llama_jax.bench": bench,
    }
    if module == "llama_jax.finetune" and arguments[0].startswith("--"):
        flags.parse(arguments)
        return
    with pytest.raises(SystemExit) as exit:
        mains[module]([*arguments, "--help"])
    assert exit.value.code == 0
    helped = capsys.readouterr().out
    assert all(word in helped for word in arguments if word.startswith("--"))


@pytest.mark.slow
def test_the_code_on_the_page_runs(folder: pathlib.Path, capsys: Any) -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(compile(code, str(PAGE), "exec"), names)
    out = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in out[:3]] == [f"{{'step': {n}," for n in (1, 2, 3)]
    assert len(out) == 6
    assert all(float(number) >= 0 for line in out[3:] for number in line.split())
    for model in (load("tuned"), names["tuned"]):
        assert model.model.config == names["opened"].config
    assert load(adapter="tuned-adapter").params
