"""A small grid that is never really trained."""

import pytest
import yaml

from harness.experiments.grid import Experiment, load_experiment
from tests.helpers import ROOT

VARIANTS = {
    "a": None,
    "b": {"training": {"init_from": "@a"}},
    "c": {"model": {"normalizer": "softmax1"}},
}


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    grid = {"question": "?", "base": str(ROOT / "configs" / "backcopy_softmax.yaml"), "seeds": [1, 2]}
    grid |= {"variants": VARIANTS, "diagnostics": {"perplexity": {"batches": 1}}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    found = load_experiment(tmp_path / "grid.yaml", tmp_path)
    (found.folder / "logs").mkdir(parents=True)
    return found
