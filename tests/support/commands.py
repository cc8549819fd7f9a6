"""Run a command in this process, and capture its status and output."""

from collections.abc import Callable, Sequence

import pytest

from llama_jax.cli import command as cli


def run_command(
    main: Callable[[Sequence[str] | None], int],
    capsys: pytest.CaptureFixture[str],
    *argv: str,
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as exit:
        cli.run(main, argv)
    out, err = capsys.readouterr()
    assert isinstance(exit.value.code, int)
    return exit.value.code, out, err
