"""A corpus for the diagnostics of tiny models."""

from pathlib import Path

import pytest

from tests.helpers import tiny_corpus


@pytest.fixture
def corpus(tmp_path) -> Path:
    """400 and 201 characters out of 13."""
    return tiny_corpus(tmp_path / "corpus")
