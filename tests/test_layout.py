"""The test of a thing is where its name says: the tests mirror kernels/, measure/ and harness/. And no file is long."""

import pytest

from tests.helpers import ROOT

# Packages whose parts one file tests together, and why.
TOGETHER = {
    "measure/theory": "a check is only a check if a change of any part is noticed: measure/test_theory.py changes each",
    "harness/report": "its parts are steps on the way to one page: scripts/test_report.py reads it, and in a browser",
    "harness/gpu_report": "its parts are sections of one report: scripts/test_gpu_report.py runs it whole",
}
MODULES = sorted(
    path.relative_to(ROOT)
    for floor in ("kernels", "measure", "harness")
    for path in (ROOT / floor).rglob("*.py")
    if not path.name.startswith("__")
)


@pytest.mark.parametrize("module", [m for m in MODULES if str(m.parent) not in TOGETHER], ids=str)
def test_every_module_has_a_test_file_of_its_name_at_its_place(module):
    assert (ROOT / "tests" / module.parent / f"test_{module.name}").is_file()


@pytest.mark.parametrize("package", TOGETHER)
def test_what_is_tested_together_is_a_package_and_has_its_file(package):
    assert (ROOT / package / "__init__.py").is_file()
    assert [*(ROOT / "tests").rglob(f"test_{package.rpartition('/')[2]}.py")]


def test_every_file_is_read_in_one_sitting():
    limits = {"model.py": 550} | {str(path.relative_to(ROOT)): 120 for path in (ROOT / "scripts").glob("*.py")}
    floors = [ROOT / floor for floor in ("kernels", "measure", "harness", "scripts", "data", "tests")]
    files = [*ROOT.glob("*.py"), *(path for floor in floors for path in floor.rglob("*.py"))]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > limits.get(name, 400)} == {}
