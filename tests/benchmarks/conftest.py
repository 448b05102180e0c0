"""Benchmarks as commands, whose cells need not import the libraries anew."""

import runpy
import sys

import pytest

from benchmarks import cell
from tests.training.runs import REPOSITORY, Forked


@pytest.fixture
def forked_cells(monkeypatch):
    """Cells are processes of their own as ever, but forked from one that has imported the libraries."""
    monkeypatch.setattr(cell, "start", Forked)


@pytest.fixture
def bench(monkeypatch, tmp_path, forked_cells):
    """A function that runs `python benchmarks/NAME.py FLAGS` in an empty directory, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *flags: str) -> None:
        script = str(REPOSITORY / "benchmarks" / f"{name}.py")
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(script, run_name="__main__")

    return run
