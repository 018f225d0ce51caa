"""The shape of the package, counted in its syntax trees: what a newcomer has to hold in mind at once stays small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_sentinel as ls

PACKAGE = Path(ls.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
"""In lines, without its docstring."""
MOST_ATTRIBUTES = 12
MOST_ARGUMENTS = 8
THE_USERS = {"SentinelStrategy", "AnomalyScore", "AttackInjector"}
"""Classes whose constructors are an interface to users, who name the arguments."""


def lines_of(function: ast.FunctionDef) -> int:
    assert function.end_lineno is not None
    docstring = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (0 if docstring is None else docstring.count("\n") + 1)


def own_attributes(constructor: ast.FunctionDef) -> set[str]:
    targets = [
        target
        for node in ast.walk(constructor)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    attributes = [one for one in targets if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name)]
    return {one.attr for one in attributes if isinstance(one.value, ast.Name) and one.value.id == "self"}


def constructors(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, one) for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_files_functions_and_classes_are_small(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not {one.name: lines_of(one) for one in functions if lines_of(one) > LONGEST_FUNCTION}
    for name, constructor in constructors(tree):
        assert len(own_attributes(constructor)) <= MOST_ATTRIBUTES, name
        arguments = [*constructor.args.args, *constructor.args.kwonlyargs][1:]
        assert len(arguments) <= MOST_ARGUMENTS or name in THE_USERS, name


def test_no_class_declares_an_attribute_of_another() -> None:
    """A class that declares without a value what it does not set itself leans on a class that inherits from it."""
    leaning: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or node.decorator_list or _is_record(node):
                continue
            declared = {
                one.target.id
                for one in node.body
                if isinstance(one, ast.AnnAssign) and one.value is None and isinstance(one.target, ast.Name)
            }
            assigned = {
                target.attr
                for one in ast.walk(node)
                if isinstance(one, (ast.Assign, ast.AnnAssign))
                for target in (one.targets if isinstance(one, ast.Assign) else [one.target])
                if isinstance(target, ast.Attribute)
            }
            assigned |= _registered(node)
            if declared - assigned:
                leaning[node.name] = declared - assigned
    assert not leaning


def _registered(node: ast.ClassDef) -> set[str]:
    """Buffers that a torch module registers by name."""
    calls = [one for one in ast.walk(node) if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)]
    named = [one.args[0] for one in calls if one.func.attr == "register_buffer"]  # type: ignore[attr-defined]
    return {str(name.value) for name in named if isinstance(name, ast.Constant)}


def _is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a tuple with names, or an interface, which have declarations only."""
    return any(isinstance(base, ast.Name) and base.id in ("NamedTuple", "Protocol", "TypedDict") for base in node.bases)


def test_a_step_goes_through_fifteen_files_and_four_that_judge() -> None:
    """From Lightning's hook to the optimizer, as docs/architecture.md draws it."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    drawing = text.split("## One training step")[1].split("```")[1]
    drawn = set(re.findall(r"\w+\.py", drawing))
    judging = {"verifier.py", "verdicts.py", "auditing.py", "ledger.py"}
    there = {file.name for file in PACKAGE.rglob("*.py")}
    assert judging <= drawn <= there
    assert len(drawn - judging) <= 15
