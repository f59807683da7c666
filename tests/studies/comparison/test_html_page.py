"""The page is well-formed, complete, and nothing in it is obeyed or fetched."""

import re
from html.parser import HTMLParser

import pytest

from peft_jax.studies.comparison import html_page, report, run_of
from peft_jax.studies.comparison.report import drawings
from tests.studies.comparison import examples

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """The tags of a page, its ids, its text; raises where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(records, command=""):
    records = list(records)
    return Page(html_page.page(records, drawings([run_of(record) for record in records]), command))


@pytest.fixture(scope="module")
def page():
    return page_of([examples.record("lora"), examples.record("ia3"), examples.failed()], "python run.py --config=a.py")


@pytest.mark.slow
def test_everything_is_on_the_page(page):
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"what", "table", "plots", "runs", "failures"} <= set(ids)
    assert page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption") == 6
    assert page.tags.count("details") == 3
    assert not any(name.endswith("-patch_1") for name in ids)  # matplotlib's white ground, on a dark page
    for words in ("python run.py --config=a.py", "SmolLM2-135M-Instruct", "jax 0.10.2", "x86_64", "reviews",
                  "100 steps of 16", "the loss is NaN at step 12"):  # fmt: skip
        assert words in page.text


@pytest.mark.slow
def test_a_run_that_was_chosen_was_trained_once():
    tried, best = examples.record(chosen=None), examples.record()
    best["run_info"]["experiment_name"] = "lora/lora-best-seed-0"
    for records, minutes in (([tried, best], "1.67"), ([best, examples.record(seed=1)], "3.33")):  # 100 s each
        assert f"{minutes} minutes of training in all" in Page(html_page.page(records, [], "")).text


@pytest.mark.slow
def test_every_reference_stays_inside_the_page(page):
    ids = {value for name, value in page.attributes if name == "id"}
    urls = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert urls and all(url == "data:," or url.removeprefix("#") in ids for url in urls)
    styles = " ".join(value for name, value in page.attributes if name in ("style", "clip-path", "fill"))
    assert all(found in ids for found in re.findall(r"url\(#([^)]+)\)", styles))


@pytest.mark.slow
@pytest.mark.parametrize("records", [[examples.failed("a/<b>")], [examples.peft_record(), *examples.hostile()]])
def test_text_is_text(records):
    page = page_of(records, "<script>alert(3)</script>")
    assert "script" not in page.tags and "img" not in page.tags and "b" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert(3)</script>" in page.text and "\x1b" not in page.text


@pytest.mark.slow
def test_a_report_is_a_folder_of_whole_files(tmp_path):
    paths = report(tmp_path, [examples.record("lora"), examples.failed()], "python run.py")
    names = {str(path.relative_to(tmp_path)) for path in paths}
    assert {"table.md", "table.csv", "table.json", "report.html", "plots/loss.svg", "plots/loss.png"} <= names
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(paths)
    assert all(path.stat().st_size > 100 for path in paths)
    assert report(tmp_path, [examples.failed()]) and "No run finished" in (tmp_path / "report.html").read_text()
