"""Rules of the house that no linter checks."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    Path(folder, name)
    for folder, _, names in os.walk(ROOT / "lit_merge", followlinks=True)
    for name in names
    if name.endswith(".py")
)
IDS = [str(path.relative_to(ROOT)) for path in FILES]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public classes, functions and methods; magic methods are not counted."""
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    while todo:
        prefix, parent = todo.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    todo.append((f"{prefix}{node.name}.", node))


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Public functions and methods, and ``__init__`` of public classes."""
    for name, node in public(tree):
        if isinstance(node, ast.ClassDef):
            inits = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
            yield from ((f"{name}.__init__", init) for init in inits)
        else:
            yield name, node


def overrides(node: ast.AST) -> bool:
    """Whether a method says what the one of its base class says."""
    return any(isinstance(d, ast.Name) and d.id == "override" for d in getattr(node, "decorator_list", ()))


def test_there_are_files() -> None:
    assert {"lit_merge/module.py", "lit_merge/callbacks/report.py"} <= set(IDS)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module has none"
    assert [name for name, node in public(tree) if not ast.get_docstring(node) and not overrides(node)] == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_everything_public_is_annotated(path: Path) -> None:
    bare = []
    for name, node in functions(parsed(path)):
        arguments = node.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare += [f"{name}({a.arg})" for a in given if a and not a.annotation and a.arg not in ("self", "cls")]
        bare += [] if node.returns else [f"{name} -> ?"]
    assert bare == []


@pytest.mark.parametrize(
    "path",
    [p for folder in ("lit_merge", "callbacks", "configs", "tests") for p in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", sorted((ROOT / "lit_merge/functional").glob("*.py")), ids=lambda path: path.name)
def test_functional_code_knows_no_lightning(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in ("lightning", "pytorch_lightning", "torchmetrics")
            assert not name.startswith("lit_merge.") or name.startswith(("lit_merge.functional", "lit_merge.errors"))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_module_says_what_it_offers(path: Path) -> None:
    tree = parsed(path)
    targets = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    if path.name != "__init__.py" or any(isinstance(node, ast.ImportFrom) and node.level == 0 for node in tree.body):
        has_public = any(True for _ in public(tree))
        assert "__all__" in targets or not has_public
