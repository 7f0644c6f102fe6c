"""The two pages are what beside.py makes of their sources, lack no function of the papers, and load nothing.

    pip install -r docs/requirements.txt
    python -m pytest -q docs
"""
import ast
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import beside  # noqa: E402

PAGES = "ddpo", "dpok"


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_its_source_and_the_scripts_make(name):
    """Every name of a function, line or test in it is thereby one that exists: `python docs/beside.py`."""
    assert read(f"{name}.html") == beside.make(name)


@pytest.mark.parametrize("name", PAGES)
def test_all_that_is_of_the_paper_stands_on_the_page(name):
    script = (HERE.parent / f"{name}.py").read_text(encoding="utf-8")
    paper = ast.parse(script.partition("# ========== the paper ends here")[0]).body
    names = {node.name for node in paper if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    shown = re.findall(r"</a>, lines \d+ to \d+: <code>(\w+)<", read(f"{name}.html"))
    assert len(names) > 15 and names <= set(shown)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_well_formed_and_loads_nothing(name):
    page = ET.fromstring(read(f"{name}.html"))
    tags, anchors = {node.tag for node in page.iter()}, {node.get("id") for node in page.iter()}
    assert not tags & {"script", "link", "iframe", "object", "embed", "video", "audio", "base"}
    assert all(node.get("src").startswith("data:image/png") for node in page.iter("img"))
    assert not re.search(r"@import|url\(", read("style.css"))
    for target in (node.get("href") for node in page.iter("a")):
        file, _, anchor = target.partition("#")
        if not file:
            assert anchor in anchors, target
        elif not target.startswith("https://"):
            assert (HERE / file).exists(), target
            if file.endswith(".html"):
                assert f'id="{anchor}"' in read(file) or not anchor, target
    text = "".join(page.find("body").itertext())
    assert page.find(".//{http://www.w3.org/1998/Math/MathML}math") is not None
    assert not re.search(r"\$|\\[a-z]|\ue000", text)  # no formula is shown as its source


@pytest.mark.parametrize("entry, missing", [("no_such_function", "no_such_function"),
                                            ("train[while not finished ... no such line]", "no such line"),
                                            ("train[norms.append ... while not]", "while not")])
def test_what_a_source_names_must_be_there(entry, missing):
    with pytest.raises(ValueError, match=missing):
        beside.locate("ddpo.py", entry)
    with pytest.raises(ValueError, match="test_of_nothing"):
        beside.show_tests(["test_of_nothing: what it would catch"])
