"""The house rules that a machine can check: sizes, docstrings, annotations of the tree, heavy imports."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("api", "cli", "core", "migrations", "models", "worker")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
HEAVY = {"torch", "transformers", "triton", "scipy", "numba"}


def function_lengths(path: Path) -> dict[str, int]:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        f"{path.relative_to(ROOT)}:{node.name}": (node.end_lineno or node.lineno) - body_start(node) + 1
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    }


def body_start(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The first line after the docstring: documentation is not what makes a function long."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.lineno if not is_docstring else (first.end_lineno or first.lineno) + 1


LENGTHS = {name: length for path in SOURCES for name, length in function_lengths(path).items()}


def test_no_function_is_longer_than_eighty_lines() -> None:
    assert {name: length for name, length in LENGTHS.items() if length > 80} == {}


def test_the_median_function_has_at_most_ten_lines_and_nine_of_ten_at_most_thirty_five() -> None:
    lengths = sorted(LENGTHS.values())
    assert statistics.median(lengths) <= 10
    assert lengths[int(0.9 * len(lengths))] <= 35


def test_no_file_is_longer_than_five_hundred_lines() -> None:
    too_long = {str(path): count for path in SOURCES if (count := len(path.read_text().splitlines())) > 500}
    assert too_long == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


@pytest.mark.parametrize("module", ["api.main", "worker.supervisor", "worker.reconciler", "worker.tasks", "cli.main"])
def test_processes_that_own_no_device_never_load_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_importing_a_package_imports_nothing_heavy() -> None:
    names = [str(path.parent.relative_to(ROOT)).replace("/", ".") for path in SOURCES if path.name == "__init__.py"]
    load = f"import sys, importlib; [importlib.import_module(name) for name in {names!r}]"
    code = f"{load}; print(sorted({HEAVY!r} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
