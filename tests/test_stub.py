"""llmc/_C.pyi against the compiled core: the same names, parameters and defaults."""

import ast
import re
from pathlib import Path

import pytest

import llmc
from llmc import _C

STUB = ast.parse((Path(llmc.__file__).parent / "_C.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
SCOPES = {"": (_C, STUB), **{name: (getattr(_C, name), node) for name, node in CLASSES.items() if name != "Error"}}


def public(scope: object) -> set[str]:
    return {name for name in vars(scope) if not name.startswith("_")}


def functions(node: ast.Module | ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}


@pytest.mark.parametrize("scope", SCOPES)
def test_names(scope: str) -> None:
    compiled, node = SCOPES[scope]
    attributes = {child.target.id for child in node.body if isinstance(child, ast.AnnAssign)}
    stubbed = (
        {name for name in functions(node) if name != "__init__"} | attributes | (set(CLASSES) if not scope else set())
    )
    assert stubbed == public(compiled)


def signature_of_stub(function: ast.FunctionDef) -> list[tuple[str, object]]:
    """(name, default) of every parameter; "*" stands before those that must be named."""
    arguments = function.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    pairs = list(zip(arguments.args, defaults, strict=True))
    if arguments.kwonlyargs:
        pairs += [(ast.arg("*"), None), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [(argument.arg, ast.literal_eval(default) if default else ...) for argument, default in pairs]


def signature_of_core(function) -> list[tuple[str, object]]:
    """The same from pybind11's docstring, whose first line is Python."""
    line = re.sub(r"<[^>]*>", "object", function.__doc__.splitlines()[0])
    return signature_of_stub(ast.parse(f"def {line}: ...").body[0])


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        (scope, name)
        for scope, (_, node) in SCOPES.items()
        for name, function in functions(node).items()
        if not any(getattr(decorator, "id", "") == "property" for decorator in function.decorator_list)
    ],
)
def test_parameters(scope: str, name: str) -> None:
    compiled, node = SCOPES[scope]
    ours, theirs = signature_of_stub(functions(node)[name]), signature_of_core(getattr(compiled, name))
    assert [parameter for parameter, _ in ours] == [parameter for parameter, _ in theirs]
    for (parameter, stubbed), (_, default) in zip(ours, theirs, strict=True):
        # The core holds fp32 numbers: 0.9 is 0.8999999761581421 there.
        assert stubbed == (pytest.approx(default, rel=1e-7) if isinstance(default, float) else default), parameter
