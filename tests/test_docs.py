"""The two pages are what beside.py makes of their sources, show all of a paper, and load nothing.

    pip install -r docs/requirements.txt
    python -m pytest -q tests/test_docs.py
"""
import ast
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import beside

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = ("ddpo", "dpok")
CAPTION = re.compile(r"(?P<file>\w+\.py), lines (?P<first>\d+) to (?P<last>\d+): (?P<name>\w+)")
MATHML = "{http://www.w3.org/1998/Math/MathML}math"
LOADING_TAGS = {"script", "link", "iframe", "object", "embed", "video", "audio", "base"}


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def figures_of(name):
    """Find the code on a page -> [(match of its caption, its text)]."""
    figures = []
    for figure in ET.fromstring(read(f"{name}.html")).iter("figure"):
        caption = "".join(figure.find("figcaption").itertext())
        code = "".join(figure.find("pre").itertext())
        figures.append((CAPTION.fullmatch(caption), code))
    return figures


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_its_source_and_the_scripts_make(name):
    """So every function, line and test that it names exists. Otherwise: `python docs/beside.py`."""
    assert read(f"{name}.html") == beside.make(name)


@pytest.mark.parametrize("name", PAGES)
def test_every_function_of_the_paper_is_on_the_page(name):
    script = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    paper, marker, _ = script.partition("# ========== the paper ends here")
    assert marker
    functions = set()
    for node in ast.parse(paper).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            functions.add(node.name)
    shown = {caption["name"] for caption, _ in figures_of(name)}

    assert {"predict_noise", "train"} <= functions
    assert functions <= shown


@pytest.mark.parametrize("name", PAGES)
def test_every_phase_of_training_is_on_the_page_except_for_logging(name):
    """The comments `# 1. Sample: ...` of each `train` open its phases."""
    script = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    phases = re.findall(r"^ +(# \d\. .+)$", script, re.MULTILINE)
    page = "\n".join(code for _, code in figures_of(name))

    assert len(phases) >= 5
    for phase in phases:
        assert phase in page or phase.endswith("Log and save")


@pytest.mark.parametrize("name", PAGES)
def test_the_code_on_the_page_is_that_of_the_script_line_by_line(name):
    for caption, code in figures_of(name):
        lines = (ROOT / caption["file"]).read_text(encoding="utf-8").splitlines()
        expected = []
        for number in range(int(caption["first"]), int(caption["last"]) + 1):
            expected.append(f"{number:4} {lines[number - 1]}")
        assert code.splitlines() == expected


@pytest.mark.parametrize("name", PAGES)
def test_the_page_loads_nothing(name):
    page = ET.fromstring(read(f"{name}.html"))
    tags = {node.tag for node in page.iter()}
    assert not tags & LOADING_TAGS
    for image in page.iter("img"):
        assert image.get("src").startswith("data:image/png")
    assert not re.search(r"@import|url\(", read("style.css"))


@pytest.mark.parametrize("name", PAGES)
def test_what_the_page_links_to_is_there(name):
    page = ET.fromstring(read(f"{name}.html"))
    anchors = {node.get("id") for node in page.iter()}
    for link in page.iter("a"):
        target = link.get("href")
        file, _, anchor = target.partition("#")
        if not file:
            assert anchor in anchors, target
        elif not target.startswith("https://"):
            assert (DOCS / file).exists(), target
            if file.endswith(".html") and anchor:
                assert f'id="{anchor}"' in read(file), target
            if file.endswith(".md") and anchor:
                assert anchor in headings_of(DOCS / file), target


def headings_of(file):
    """Make the anchors of the headings of a Markdown file as GitHub does."""
    anchors = []
    for heading in re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
        letters = re.sub(r"[^\w -]", "", heading).lower()
        anchors.append(letters.replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("name", PAGES)
def test_every_formula_is_shown_as_mathml_and_none_as_its_source(name):
    page = ET.fromstring(read(f"{name}.html"))
    assert page.find(f".//{MATHML}") is not None
    text = "".join(page.find("body").itertext())
    assert not re.search(r"\$|\\[a-z]|\ue000", text)


@pytest.mark.parametrize("entry, missing", [
    ("no_such_function", "no_such_function"),
    ("train[while not finished ... no such line]", "no such line"),
    ("train[grad_norms.append ... while not]", "while not")])
def test_code_that_a_source_names_must_be_there(entry, missing):
    with pytest.raises(ValueError, match=missing):
        beside.locate("ddpo.py", entry)


def test_a_test_that_a_source_names_must_be_there():
    with pytest.raises(ValueError, match="test_of_nothing"):
        beside.show_tests(["test_of_nothing: what it would catch"])


def test_an_indented_line_below_a_heading_continues_the_one_above():
    head = "The clip\ncode: sample,\n    train\ntest: test_of_it:\n    what it would catch"
    heading, code, tests = beside.read_head(head)
    assert heading == "The clip"
    assert code == ["sample", "train"]
    assert tests == ["test_of_it: what it would catch"]


def test_a_line_below_a_heading_that_is_neither_code_nor_test_is_an_error():
    with pytest.raises(ValueError, match="tset: test_of_it"):
        beside.read_head("The clip\ntset: test_of_it: what it would catch")
