"""requirements.txt lists what is used, says why, and needs no newer Python than the README says."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

from tests.test_budget import FILES, SOURCE

ROOT = Path(__file__).resolve().parents[1]
LINES = [
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
]
LISTED = {re.match(r"[\w-]+", line)[0].lower() for line in LINES}
# Used by name, by another package or by pytest's settings, and imported by no file of ours.
INDIRECT = {"mpi4py", "ninja", "pytest-timeout", "pytest-xdist", "ruff"}


def imported() -> set[str]:
    """Top-level names of other people's packages that our files import."""
    names = set()
    for file in FILES:
        if file.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    local = {*SOURCE, *(file.stem for file in FILES)}
    return names - local - set(sys.stdlib_module_names) - {"__future__"}


def distributions() -> dict[str, set[str]]:
    """Imported name -> the distributions that bring it."""
    brought = importlib.metadata.packages_distributions()
    return {name: {found.lower().replace("_", "-") for found in brought.get(name, ())} for name in imported()}


def test_every_requirement_says_why():
    assert [line for line in LINES if not re.search(r"  # \S", line)] == []


def test_every_requirement_is_used():
    used = set().union(*distributions().values())
    assert LISTED - used == INDIRECT


def test_every_import_is_listed_or_comes_with_what_is():
    direct = set()
    for name in LISTED - {"triton"}:  # absent where torch has no GPU build
        for requirement in importlib.metadata.requires(name) or ():
            if "extra ==" not in requirement:
                direct.add(re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-"))
    missing = [name for name, found in distributions().items() if not found & (LISTED | direct)]
    assert missing == []


def test_readme_names_a_python_that_all_of_it_takes():
    minor = int(re.search(r"Python 3\.(\d+) or later", (ROOT / "README.md").read_text())[1])
    for name in LISTED - {"triton"}:
        needed = re.search(r">=\s*3\.(\d+)", importlib.metadata.metadata(name).get("Requires-Python") or "")
        assert needed is None or int(needed[1]) <= minor, name
