"""Every picture of the theory has what its panels promise: titles, labels, and curves of finite numbers."""

import inspect

import matplotlib.pyplot as plt
import numpy as np
import pytest

from harness import theory_pictures

PICTURES = {name: f for name, f in vars(theory_pictures).items() if name.startswith("draw_") and inspect.isfunction(f)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_panels_are_titled_and_labelled_and_their_curves_exist(name):
    figure = PICTURES[name]()
    assert figure.axes
    for panel in figure.axes:
        if panel.get_label() == "<colorbar>":
            continue
        assert panel.get_title() or panel.get_title(loc="left")
        assert panel.get_xlabel()
        assert panel.lines or panel.patches or panel.collections
        for line in panel.lines:
            assert np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any()
    plt.close(figure)
