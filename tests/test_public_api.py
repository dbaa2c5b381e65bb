"""What `import dspark` gives, and what it costs."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import dspark

PACKAGE = Path(dspark.__file__).parent
CORE = sorted(
    path.relative_to(PACKAGE).as_posix()
    for pattern in ("*.py", "draft/*.py", "verify/*.py", "models/*.py", "adapters/**/*.py")
    for path in PACKAGE.glob(pattern)
)


def test_all_is_sorted_and_complete() -> None:
    assert dspark.__all__ == sorted(dspark.__all__)
    assert len(set(dspark.__all__)) == len(dspark.__all__)
    assert set(dspark.__all__) == {*dspark._HOME, "__version__"}
    assert dir(dspark) == dspark.__all__


@pytest.mark.parametrize("name", [name for name in dspark.__all__ if name != "__version__"])
def test_every_name_resolves_to_what_its_module_exports(name: str) -> None:
    found = getattr(dspark, name)
    assert found.__name__ == name
    assert name in sys.modules[found.__module__].__all__


def test_every_error_is_public() -> None:
    from dspark import errors

    assert set(errors.__all__) <= set(dspark.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = dspark.Motor


def test_the_version_is_that_of_the_package() -> None:
    assert dspark.__version__ == importlib.metadata.version("dspark")


def test_importing_is_quick_and_does_not_import_torch() -> None:
    """A command line that shows its help must not wait for torch."""
    code = (
        "import sys, time; start = time.perf_counter(); import dspark; "
        "print(time.perf_counter() - start, "
        "*(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    seconds = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        took, *heavy = out.stdout.split()
        assert heavy == ["False", "False", "False"]
        seconds.append(float(took))
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("arguments", "modules"), [(["--version"], set()), (["plan", "--help"], {"plan"})]
)
def test_a_command_line_imports_no_torch_and_no_other_command(
    arguments: list[str], modules: set[str]
) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from dspark.cli import app; "
        "r = CliRunner().invoke(app, sys.argv[1:]); print(r.exit_code, 'torch' in sys.modules, "
        "*(name[16:] for name in sys.modules if name.startswith('dspark.commands.')))"
    )
    command = [sys.executable, "-c", code, *arguments]
    status, has_torch, *found = subprocess.run(
        command, capture_output=True, text=True
    ).stdout.split()
    assert (status, has_torch) == ("0", "False")
    assert set(found) == modules


def _undocumented(tree: ast.Module) -> list[str]:
    """Public classes and functions, and public methods of public classes, without a docstring."""
    missing = [] if ast.get_docstring(tree) else ["module"]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        methods = [m for m in inner if isinstance(m, kinds) and not m.name.startswith("_")]
        missing += [m.name for m in (node, *methods) if not ast.get_docstring(m)]
    return missing


@pytest.mark.parametrize("path", CORE)
def test_everything_public_says_what_it_is(path: str) -> None:
    assert _undocumented(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))) == []


def test_a_missing_docstring_is_noticed() -> None:
    source = '"""Module."""\nclass A:\n    """A."""\n    def b(self): ...\n    def _c(self): ...\n'
    assert _undocumented(ast.parse(source)) == ["b"]
