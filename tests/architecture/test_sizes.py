"""Gates against growth: the aim is files of 60-150 lines and functions that fit a screen; these bounds are generous.

A function's length is that of its body: the parameters of a command are its options, one a line.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
NAMELESS = {"utils", "util", "common", "helpers", "base", "misc", "types"}


def modules() -> Iterator[Path]:
    for package in ("engine", "cluster", "dashboards"):
        yield from sorted((ROOT / package).rglob("*.py"))


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.body[0].lineno >= MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_every_module_is_named_after_a_noun() -> None:
    assert [str(path) for path in modules() if path.stem in NAMELESS] == []
