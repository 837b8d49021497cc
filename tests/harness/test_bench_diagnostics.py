"""A row of the benchmark of diagnostics: seconds, beside the bare forward passes where these are the measure."""

import pytest

from harness.bench_diagnostics import DIAGNOSTICS, bench
from tests.helpers import tiny_gpt


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_row_is_of_positive_times_and_their_ratio(name):
    row = bench(name, tiny_gpt().config, sequences=2, repeat=2, device_name="cpu")
    assert row["diagnostic"] == name
    assert row["seconds"] > 0
    if DIAGNOSTICS[name][1]:
        assert row["ratio"] == row["seconds"] / row["forward passes"]
    else:
        assert row["ratio"] is row["forward passes"] is None
    assert row["peak MiB"] >= row["added MiB"] >= 0
