"""Documented functions of the running Python's standard library (PSF licence): the embedded code data.

Nothing is shipped: the pairs are read from the installation at run time, so they follow the Python version.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from data.example import Example

_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def stdlib_files() -> list[Path]:
    """The standard library's Python files without its tests and large applications, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(root).parts) and "_sysconfigdata" not in path.name
    )


def stdlib_functions(longest: int = 700) -> Iterator[Example]:
    """`docstring -> function` pairs whose code is at most `longest` characters.

    A whole file is on one side of the validation split. The order mixes the files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    made = []
    for path in stdlib_files():
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        lines = source.split("\n")  # a form feed ends no line for the parser
        for node in _functions(tree):
            pair = _pair(node, lines)
            if pair is None or len(pair[1]) > longest or pair[1] in seen or not _is_python(pair[1]):
                continue
            seen.add(pair[1])
            made.append(
                Example(
                    family="code",
                    messages=[
                        {"role": "user", "content": pair[0]},
                        {"role": "assistant", "content": pair[1]},
                    ],
                    dataset="stdlib",
                    template=path.relative_to(root).as_posix(),
                    prompt_format="task",
                )
            )
    random.Random(0).shuffle(made)
    yield from made


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions, those of classes and functions included, without entering expressions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """Task and solution of one function: its first paragraph of documentation, and its code without it."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    summary = re.sub(r"\s+", " ", docstring.split("\n\n")[0])
    if not 20 <= len(summary) <= 240 or not summary.isascii():
        return None
    statement = node.body[0]
    head = lines[node.lineno - 1 : statement.lineno - 1]
    body = lines[statement.end_lineno : node.end_lineno]
    code = textwrap.dedent("\n".join(head + body)).strip("\n")
    if not code.isascii() or not head:
        return None
    return f"Write the Python function `{node.name}`. {summary}", code


def _is_python(code: str) -> bool:
    """Whether the code still stands on its own: a text at the margin, say, keeps it from being dedented."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(code)
    except SyntaxError:
        return False
    return True
