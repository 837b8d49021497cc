"""The house has floors: scripts/ and train.py → harness/ → measure/ → model.py → kernels/, and imports only go down."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

FLOORS = ("kernels", "model", "measure", "harness", "train", "scripts")  # from the ground up
ABOVE_ALL = ("data", "tests")  # which may import from any
MODULES = sorted(path for floor in FLOORS for path in (*ROOT.glob(f"{floor}.py"), *(ROOT / floor).rglob("*.py")))


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_floor_imports_from_itself_and_below_alone(path):
    own = FLOORS.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    above = {*FLOORS[own + 1 :], *ABOVE_ALL}
    assert not imported(path) & above


def test_every_module_stands_on_a_floor():
    names = {
        path.name.removesuffix(".py")
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names <= {*FLOORS, *ABOVE_ALL}
