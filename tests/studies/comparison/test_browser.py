"""The report in a real browser: it opens from the disk, asks for nothing, and everything on it can be seen."""

import itertools
import json
import shutil

import pytest

from peft_jax.studies.comparison import report
from tests.studies.comparison import examples

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER),
                                                   reason="needs Debian's chromium and chromium-driver")]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
SECTIONS = ("what", "table", "plots", "runs", "failures")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")  # the driver is on this machine
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of every method with two seeds, of hostile records, and of peft's."""
    folder = tmp_path_factory.mktemp("report")
    records = [*examples.comparison(seeds=2), *examples.hostile(), examples.peft_record()]
    report(folder, records, "python run.py --config=x")
    return (folder / "report.html").as_uri()


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (800, "light"), (800, "dark")], ids=str)
def opened(request, driver, page):
    """The page at a width in pixels and in a colour scheme."""
    width, scheme = request.param
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                           {"features": [{"name": "prefers-color-scheme", "value": scheme}]})  # fmt: skip
    for kind in ("browser", "performance"):
        driver.get_log(kind)  # of the page before
    driver.get(page)
    return driver


def test_it_opens_without_an_error_and_asks_for_nothing(opened, page):
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages
             if message["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert page in asked and all(url == page or url.startswith("data:") for url in asked)
    assert opened.execute_script("return document.scripts.length") == 0


def test_every_section_every_row_and_every_plot_is_seen(opened):
    sizes = boxes(opened, "section, figure svg, figcaption, table.rows")
    assert all(box["width"] > 100 and box["height"] > 10 for box in sizes)
    assert all(boxes(opened, f"#{name} h2") for name in SECTIONS)
    assert len(boxes(opened, "figure svg")) == len(boxes(opened, "figcaption")) >= 10
    names = opened.execute_script("return [...document.querySelectorAll('table.rows')].map(table => "
                                  "[...table.tBodies[0].rows].map(row => row.cells[0].innerText))")  # fmt: skip
    assert len(names) == 4 and all(set(examples.METHODS) - {"lora"} <= set(rows) for rows in names)
    assert all(any("<script>alert(1)</script>" in name for name in rows) for rows in names)


def test_no_text_is_cut_or_leaves_the_page(opened):
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    if opened.execute_script("return innerWidth") == 1280:
        assert opened.execute_script("return [...document.querySelectorAll('.scroll')].every("
                                     "e => e.scrollWidth <= e.clientWidth)")  # fmt: skip
    cut = opened.execute_script("return [...document.querySelectorAll('h1, h2, p, dd, dt, td, th, caption, figcaption,"
                                " summary')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)"
                                ".map(e => e.innerText)")  # fmt: skip
    assert cut == []


def test_text_in_plots_keeps_apart_and_inside(opened):
    for figure in opened.find_elements("css selector", "figure"):
        frame, texts = opened.execute_script(
            "const box = e => { const b = e.getBoundingClientRect(); return [e.textContent.trim(), b.x, b.y, b.right,"
            " b.bottom] }; const svg = arguments[0].querySelector('svg');"
            "return [box(svg), [...svg.querySelectorAll('text')].map(box)]", figure)  # fmt: skip
        name = figure.get_attribute("id")
        assert texts, name
        for text in texts:
            assert text[1] >= frame[1] - 1 and text[2] >= frame[2] - 1, (name, text, frame)
            assert text[3] <= frame[3] + 1 and text[4] <= frame[4] + 1, (name, text, frame)
        for one, other in itertools.combinations(texts, 2):
            assert not covers(one, other), (name, one, other)


def covers(one, other) -> bool:
    """Whether two texts share more than the air above and below their letters."""
    width = min(one[3], other[3]) - max(one[1], other[1])
    height = min(one[4], other[4]) - max(one[2], other[2])
    return width > 1 and height > 0.3 * min(one[4] - one[2], other[4] - other[2])


def test_text_can_be_told_from_its_ground(opened):
    """Contrast of at least 4.5 (WCAG 2.1, 1.4.3) in both colour schemes; in plots too, whose text takes the page's."""
    ground = luminance(opened, "return getComputedStyle(document.body).backgroundColor")
    for selector, colour in (("body", "color"), (".faint", "color"), (".bad", "color"), ("figure text", "fill")):
        ink = luminance(opened, f"return getComputedStyle(document.querySelector('{selector}')).{colour}")
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, (selector, ink, ground)


def luminance(driver, script) -> float:
    text = driver.execute_script(script)
    parts = [int(part) / 255 for part in text.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def boxes(driver, selector):
    return driver.execute_script(f"return [...document.querySelectorAll({selector!r})].map(e => "
                                 "{ const b = e.getBoundingClientRect(); return {width: b.width, height: b.height} })")


def test_a_run_unfolds_to_its_record(opened):
    opened.execute_script("document.querySelector('details').open = true")
    (box, *_) = boxes(opened, "details[open] pre")
    assert box["height"] > 200
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in opened.find_element("css selector", "details pre").text
