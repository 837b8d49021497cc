"""The page of an experiment in a browser: charts, tables, colours, sizes of window."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from harness.report import theme
from tests.scripts.test_report import (
    CLAIM,
    HOSTILE,
    in_the_root,  # noqa: F401 (for every test)
    made,
    write_experiment,
)


class Browser:
    """Chromium with a page open."""

    def __init__(self, path: Path, profile: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for word in (
            "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
            f"disable-component-update disable-sync user-data-dir={profile}"
        ).split():
            options.add_argument(f"--{word}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.chrome.service.Service(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # of the page that it begins with
        self.driver.get(path.as_uri())
        end = time.monotonic() + 60
        while not (drawn := self.js("return document.documentElement.dataset.drawn")) and time.monotonic() < end:
            time.sleep(0.05)
        self.drawn = drawn

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def emulate(self, scheme: str = "light", media: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features, "media": media})

    def resize(self, width: int, mobile: bool = False) -> None:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1 + mobile, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def color(self, selector: str, what: str) -> str:
        """As #rrggbb."""
        rgb = self.js(f"return getComputedStyle(document.querySelector({selector!r})).{what}")
        return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", rgb)[:3])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """On the page of an experiment whose every text wants to be something else."""
    pytest.importorskip("selenium", reason="the page is not tried in a browser: selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("the page is not tried in a browser: there is no chromium with its chromedriver")
    claim = CLAIM | {"sentence": HOSTILE, "source": HOSTILE, "tested_at": HOSTILE}
    folder = tmp_path_factory.mktemp("browser")
    out = write_experiment(folder, claims=[claim], question=HOSTILE, name="""a '&" <b>""")
    made(out)
    browser = Browser(out / "report.html", folder / "profile")
    yield browser
    browser.driver.quit()


def test_charts_are_drawn_and_nothing_is_wrong(browser):
    assert int(browser.drawn) == browser.js("return document.querySelectorAll('.chart').length") > 8
    empty = "return [...document.querySelectorAll('.chart')].filter(c => !c.querySelector('svg .mark-symbol path,"
    assert browser.js(empty + " svg .mark-rect path')).length") == 0
    assert browser.driver.get_log("browser") == []


def test_no_request_leaves_the_page(browser):
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_texts_are_shown_as_they_are(browser):
    assert browser.js("return document.querySelector('h1').textContent") == HOSTILE
    assert browser.js("return document.querySelector('.finding h3').textContent") == HOSTILE
    assert browser.js("return document.title") == HOSTILE
    assert HOSTILE in browser.js("return document.querySelector('.finding .facts').textContent")
    assert "a '&\" <b>.yaml" in browser.js("return document.querySelector('#Commands').textContent")


def test_tables_sort_by_click_and_by_key(browser):
    from selenium.webdriver.common.keys import Keys

    table = "document.querySelector('#Results table')"
    (button,) = [b for b in browser.js(f"return {table}.querySelectorAll('th button')") if b.text == "avg kurtosis"]

    def found() -> tuple[str, list[str]]:
        head = browser.js("return arguments[0].closest('th').getAttribute('aria-sort')", button)
        return head, browser.js(f"return [...{table}.tBodies[0].rows].map(r => r.cells[0].textContent)")

    assert found()[0] == "none"
    browser.js("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", button)
    button.click()
    assert found() == ("ascending", ["softmax1", "softmax", "gate"])
    button.send_keys(Keys.ENTER)
    assert found() == ("descending", ["gate", "softmax", "softmax1"])
    assert browser.js(f"return {table}.querySelectorAll('[aria-sort=ascending], [aria-sort=descending]').length") == 1
    assert browser.js("return getComputedStyle(arguments[0]).outlineStyle", button) == "solid"


def test_light_dark_and_print(browser):
    label, line = "#Curves .role-axis-label text", "#Curves .mark-line path"
    for scheme, media, dark in (("dark", "", True), ("light", "", False), ("dark", "print", False)):
        browser.emulate(scheme, media)
        wanted = theme.colors(dark)
        assert browser.color("html", "color") == wanted["ink"].lower()
        assert browser.color(label, "fill") == wanted["muted"].lower()
        assert browser.color(line, "stroke") == wanted["c0"].lower()
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js("return document.querySelectorAll('details:not([open])').length") == 0
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert browser.js("return document.querySelectorAll('details[open]').length") == 0
    browser.emulate()


def test_what_decides_a_claim_fits_a_window(browser):
    browser.resize(1200)
    assert browser.js("const s = document.querySelector('.finding .scroll'); return s.scrollWidth - s.clientWidth") == 0


def test_a_phone_scrolls_in_tables_alone(browser):
    browser.resize(390, mobile=True)
    widths = "return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    assert browser.js(widths) == [390, 390, 390]
    assert browser.js("const s = document.querySelector('#Results .scroll'); return s.scrollWidth > s.clientWidth")
    too_wide = "return [...document.querySelectorAll('.chart svg')].filter(s => s.getBoundingClientRect().right > 390)"
    assert browser.js(too_wide + ".length") == 0
    outcome = "document.querySelector('.finding tbody td').getBoundingClientRect()"
    assert browser.js(f"return {outcome}.right") < 390
