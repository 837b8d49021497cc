"""Numbers and texts as a report prints them."""

import json
import re

import pytest
import vl_convert

from harness.report import charts, markdown, numbers, theme
from harness.report.document import Figure
from measure.seeds import Estimate, estimate


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "–"),
        (estimate([0.5]), "0.5"),
        (Estimate(3, 2.34567, 0.1, 2.34257, 2.34877), "2.3457 ± 0.0031"),
        (Estimate(3, -1234.5, 9.0, -1330.5, -1138.5), "−1234 ± 96"),
        (Estimate(3, 1.0, 1e-9, 1 - 1e-8, 1 + 1e-8), "1 ± 1e−08"),
        (Estimate(3, 7.0, 0.0, 7.0, 7.0), "7 ± 0"),
    ],
)
def test_mean_with_two_digits_of_its_error(found, text):
    assert numbers.with_interval(found) == text


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ((0, 20, 40), ["0", "10", "20", "30", "40"]),  # and not 1e+1
        ((0, 20_000, 40_000), ["0", "10,000", "20,000", "30,000", "40,000"]),
        ((0, 2e-5, 4e-5), ["0", "0.00001", "0.00002", "0.00003", "0.00004"]),
    ],
)
def test_axes_are_labelled_in_digits(sizes, shown):
    points = [numbers.Point(500.0 * i, estimate([size])) for i, size in enumerate(sizes)]
    panel = charts.lines("kurtosis", "", {"softmax": points}, ["softmax"], zero=True)
    svg = vl_convert.vegalite_to_svg(json.dumps(theme.drawn(Figure("along", "", [panel], legend=False))))
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert [label for label in labels if label in shown][-5:] == shown
    assert {"0", "200", "1,000"} <= {*labels}  # steps, and not 0k


def test_markdown_shows_any_text_as_it_is():
    assert markdown.plain("a_b*c|d `e` <f> & 1. g") == r"a\_b\*c\|d \`e\` &lt;f&gt; &amp; 1. g"
    assert markdown.plain("# no\ntitle") == r"\# no title"
    assert markdown.plain("see https://a.org/b_c.") == "see <https://a.org/b_c>."
