"""Outputs of commands in the documentation equal what the commands print."""

import re

import pytest
from support.paths import DOCS

from llama_jax import plan

PARALLELISM = DOCS / "parallelism.md"

pytestmark = pytest.mark.skipif(
    not PARALLELISM.is_file(),
    reason="the documentation is not installed with the tests",
)


def consoles() -> list[tuple[str, str]]:
    """Arguments and output of every command on the page."""
    if not PARALLELISM.is_file():
        return []
    pattern = r"```console\n\$ python -m llama_jax\.plan (.*)\n((?:.*\n)*?)```"
    return re.findall(pattern, PARALLELISM.read_text("utf-8"))


def test_the_page_on_parallelism_shows_every_mesh_axis() -> None:
    meshes = " ".join(arguments for arguments, _ in consoles())
    assert all(f"{axis}=" in meshes for axis in ("data", "fsdp", "sequence", "tensor"))


@pytest.mark.parametrize(("arguments", "output"), consoles())
def test_a_plan_in_the_documentation_is_the_planners(
    arguments: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(arguments.split()) == 0
    assert capsys.readouterr().out == output


def test_the_table_in_the_documentation_is_the_planners(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plan.main(["--table"]) == 0
    assert capsys.readouterr().out in PARALLELISM.read_text("utf-8")
