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
CAPTION = re.compile(r"(?P<file>[\w/]+\.py), lines (?P<first>\d+) to (?P<last>\d+): (?P<name>\w+)")
MATHML = "{http://www.w3.org/1998/Math/MathML}math"
SAME = re.compile(r"ddpo\.html#(?P<name>\w+)")  # a link to a function on DDPO's page
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
def test_every_function_of_the_paper_is_on_the_page_or_a_link_to_ddpos(name):
    """A link is only for a function that DDPO's page shows as a whole, under that anchor."""
    script = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    paper, marker, _ = script.partition("# ========== the paper ends here")
    assert marker
    functions = set()
    for node in ast.parse(paper).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            functions.add(node.name)
    shown = {caption["name"] for caption, _ in figures_of(name)
             if caption["file"] == f"{name}.py"}
    linked = set()
    for link in ET.fromstring(read(f"{name}.html")).iter("a"):
        if match := SAME.fullmatch(link.get("href")):
            linked.add(match["name"])
    on_ddpos_page = {figure.get("id") for figure in ET.fromstring(read("ddpo.html")).iter("figure")}

    assert {"predict_noise", "train"} <= functions
    assert linked <= on_ddpos_page
    assert functions <= shown | linked


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
    for image in page.iter("image"):
        assert image.get("href").startswith("data:image/png")
    assert not re.search(r"@import|url\(", read("style.css"))


@pytest.mark.parametrize("name", PAGES)
def test_what_the_page_links_to_is_there(name):
    page = ET.fromstring(read(f"{name}.html"))
    anchors = [node.get("id") for node in page.iter() if node.get("id")]
    assert len(anchors) == len(set(anchors))
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


@pytest.mark.parametrize("name", PAGES)
def test_a_strip_shows_every_image_of_its_picture_once_each_above_its_caption(name):
    page = ET.fromstring(read(f"{name}.html"))
    pictures = {image.get("id"): image for image in page.iter("image")}
    strips = [node for node in page.iter("div") if node.get("class") == "strip"]
    assert len(strips) == len(pictures) > 0
    for strip in strips:
        pixels = 0
        for cell in strip:
            image, caption = cell
            x, y, width, height = [int(number) for number in image.get("viewBox").split()]
            left, top, _, bottom = [int(number) for number in caption.get("viewBox").split()]
            assert (left, top) == (x, y + height)
            pixels += width * (height + bottom)
        places = {cell[0].get("viewBox") for cell in strip}
        picture = pictures[strip.find(".//use").get("href").removeprefix("#")]
        assert len(places) == len(strip)
        assert pixels == int(picture.get("width")) * int(picture.get("height"))


def test_an_equation_may_break_where_its_source_says():
    page = ET.fromstring(beside.render(r"$$ a \allowbreak = b $$ {Eq. 1}"))
    parts = ["".join(math.itertext()) for math in page.iter(MATHML)]
    assert parts == ["a", "=b"]
    assert page.find(".//wbr") is not None


def test_code_of_another_script_is_shown_with_its_file():
    figure = ET.fromstring(beside.show_code("ddpo.py", ["experiments/rwr.py:weights"]))
    caption = "".join(figure.find("figcaption").itertext())
    assert CAPTION.fullmatch(caption)["file"] == "experiments/rwr.py"


def test_a_link_to_ddpos_page_needs_the_same_text_in_both_scripts():
    assert "ddpo.html#sample" in beside.show_same("dpok.py", ["sample"])
    with pytest.raises(ValueError, match="train"):
        beside.show_same("dpok.py", ["train"])


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
    heading, entries = beside.read_head(head)
    assert heading == "The clip"
    assert entries["code"] == ["sample", "train"]
    assert entries["test"] == ["test_of_it: what it would catch"]
    assert entries["below"] == entries["same"] == []


def test_a_line_below_a_heading_of_no_known_kind_is_an_error():
    with pytest.raises(ValueError, match="tset: test_of_it"):
        beside.read_head("The clip\ntset: test_of_it: what it would catch")
