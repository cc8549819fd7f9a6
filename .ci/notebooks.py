"""Run notebooks from top to bottom, each in a new folder: `notebooks.py FILE…`.

A failure names the notebook and the cell, with what the cell wrote. Needs nbclient and
ipykernel.
"""

import os
import pathlib
import sys
import tempfile
import time

import nbclient
import nbformat
from nbclient.exceptions import CellControlSignal, DeadKernelError

SECONDS_OF_A_CELL = 300


def run(file: pathlib.Path) -> str | None:
    """Run a notebook; what went wrong, None where nothing did."""
    notebook = nbformat.read(file, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    at = "no cell"

    def begin(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal at
        at = f"cell {cell.id!r}, number {cell_index + 1}"

    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_OF_A_CELL,
        kernel_name="python3",
        on_cell_start=begin,
    )
    with tempfile.TemporaryDirectory() as folder:
        client.resources = {"metadata": {"path": folder}}
        try:
            client.execute()
        except (CellControlSignal, DeadKernelError) as error:
            return f"{file.name}, {at}: {error}"
    return None


def main() -> int:
    """Run all that are named; 1 where any failed."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning
    failures = []
    for file in map(pathlib.Path, sys.argv[1:]):
        began = time.monotonic()
        failure = run(file)
        seconds = time.monotonic() - began
        print(
            f"{file.name}: {'failed' if failure else 'ran'} in {seconds:.0f} s",
            flush=True,
        )
        if failure:
            failures.append(failure)
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
