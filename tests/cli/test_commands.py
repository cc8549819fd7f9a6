"""What every command has: --version, and a line in `python -m llama_jax`."""

import importlib
import subprocess
import sys

import pytest
from support.modules import MODULES

import llama_jax
from llama_jax.__main__ import COMMANDS, main
from llama_jax.rlhf.__main__ import STAGES

PARSERS = [
    *([name] for name in COMMANDS),
    *(["finetune", name] for name in ("merge", "tokenizer")),
    *(["conversion", name] for name in ("verify", "inspect")),
    *(["bench", name] for name in ("train", "decode", "prefill", "kernels", "data")),
    ["bench", "conversion"],
    *(["rlhf", stage] for stage in STAGES),
]


def test_the_list_of_commands_has_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    entries = {
        name.removeprefix("llama_jax.").removesuffix(".__main__")
        for name, file in MODULES.items()
        if name != "llama_jax.__main__"
        and 'if __name__ == "__main__"' in file.read_text("utf-8")
    }
    assert entries == set(COMMANDS)
    for name, purpose in COMMANDS.items():
        assert f"  {name:<12}{purpose}\n" in listed


@pytest.mark.parametrize("command", [[], *PARSERS], ids=" ".join)
def test_every_command_has_a_version(
    capsys: pytest.CaptureFixture, command: list[str]
) -> None:
    name, *rest = command or [""]
    module = f"llama_jax.{name}".rstrip(".")
    if f"{module}.__main__" in MODULES:
        module += ".__main__"
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(module).main([*rest, "--version"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"llama_jax {llama_jax.__version__}, jax ")
    assert out.count("\n") == 1


def test_a_command_runs_by_its_name() -> None:
    arguments = ["sample", "--temperature", "-1"]
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "temperature is -1.0" in done.stderr
