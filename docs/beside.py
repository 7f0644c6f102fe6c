"""Make docs/ddpo.html and docs/dpok.html, each paper's argument next to its code, from docs/ddpo.md
and docs/dpok.md.

    pip install -r docs/requirements.txt
    python docs/beside.py

A source is Markdown with LaTeX between dollar signs; {Eq. 2} after $$...$$ is the number of the
equation. The lines directly below the heading of a section name the code that is shown next to it
and the tests that prove it. An indented line continues the one above:

    code: step_distribution, train[rollout = sample ... reward = gather]
    test: test_the_policys_step_is_ddims_step_at_every_timestep:
        a wrong coefficient, timestep or variance anywhere along the chain

A name after `code:` shows the whole function or class; with brackets, the lines of it from the
first that has one text to the next that has the other. After the name of a test stands what it
would catch. A name that does not exist is an error.

A page is one file with its style, pictures and drawings in it. It needs no network and no script.
"""
import ast
import base64
import html
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = ("ddpo", "dpok")
TESTS = ("test_ddpo.py", "tests/test_experiments.py", "tests/test_gpu.py", "tests/test_shapes.py")
SCHEMES = {"light": "default", "dark": "github-dark"}  # the colours of code in each colour scheme

FORMULA = re.compile(
    r"\$\$(?P<display>.+?)\$\$(?:\s*\{(?P<number>.+?)\})?|\$(?P<inline>[^$\n]+)\$", re.DOTALL)
IMAGE = re.compile(r'<img src="(?P<file>[^"]+)"[^>]*/>')
PLACEHOLDER = "\ue000"  # stands for a formula while Markdown is rendered


def read(file: str) -> str:
    """Read a file of the project, named from its root."""
    return (ROOT / file).read_text(encoding="utf-8")


def definitions(file: str) -> dict[str, tuple[int, int]]:
    """Find the functions and classes of a script -> {name: (first line, last line)}."""
    found = {}
    for node in ast.parse(read(file)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = node.lineno
            for decorator in node.decorator_list:
                first = min(first, decorator.lineno)
            found[node.name] = (first, node.end_lineno)
    return found


def find_text(lines: list[str], text: str, first: int, last: int) -> int | None:
    """Find the first line from `first` to `last` that has a text -> its number."""
    for number in range(first, last + 1):
        if text in lines[number - 1]:
            return number
    return None


def locate(file: str, entry: str) -> tuple[int, int]:
    """Find `name` or `name[text ... text]` in a script -> (first line, last line). Raises
    ValueError."""
    name, bracket, span = entry.removesuffix("]").partition("[")
    places = definitions(file)
    if name not in places:
        raise ValueError(f"{file} has no {name!r}")
    first, last = places[name]
    if not bracket:
        return first, last
    if span.count(" ... ") != 1:
        raise ValueError(f"{entry!r} must be `name[first text ... last text]`, with no comma in it")
    lines = read(file).splitlines()
    found = []
    for text in span.split(" ... "):
        number = find_text(lines, text, first, last)
        if number is None:
            raise ValueError(f"{file}: {name} has no line with {text!r} from line {first} on")
        found.append(number)
        first = number
    start, end = found
    return start, end


def show_code(file: str, entries: list[str]) -> str:
    """Make HTML of parts of a script: highlighted, each line with its number."""
    lines = highlight(read(file), PythonLexer(), HtmlFormatter(nowrap=True)).splitlines()
    figures = []
    for entry in entries:
        first, last = locate(file, entry)
        name = entry.partition("[")[0]
        link = f'<a href="../{file}">{file}</a>'
        caption = f"{link}, lines {first} to {last}: <code>{name}</code>"
        numbered = []
        for number in range(first, last + 1):
            numbered.append(f'<span class="linenos">{number:4}</span> {lines[number - 1]}')
        code = "\n".join(numbered)
        figures.append(f"<figure><figcaption>{caption}</figcaption>"
                       f'<pre class="code" tabindex="0">{code}</pre></figure>')
    return "\n".join(figures)


def show_tests(entries: list[str]) -> str:
    """Make an HTML list of `name: what it would catch`, with links. Raises ValueError."""
    if not entries:
        return ""
    places = {}
    for file in TESTS:
        for name, (line, _) in definitions(file).items():
            places.setdefault(name, (file, line))
    items = []
    for entry in entries:
        name, _, catches = entry.partition(": ")
        if name not in places:
            raise ValueError(f"no test is called {name!r}")
        file, line = places[name]
        title = name.removeprefix("test_").replace("_", " ")
        link = f'<a href="../{file}" title="{name}, line {line}">{title}</a>'
        items.append(f"<li>{link}: {catches}</li>")
    heading = "<h3>Tested by, and what the test would catch</h3>"
    return f'<div class="proof">{heading}<ul>{"".join(items)}</ul></div>'


def show_formula(match: re.Match) -> str:
    """Make MathML of a formula that FORMULA has found."""
    tex = match["display"] or match["inline"]
    tex = " ".join(tex.split())
    if match["inline"]:
        return convert(tex, display="inline")
    math = convert(tex, display="block")
    if match["number"]:
        math += f'<span class="number">{match["number"]}</span>'
    return f'<span class="equation">{math}</span>'


def embed_image(match: re.Match) -> str:
    """Make HTML with a drawing or a picture in it, from HTML that names its file."""
    file = DOCS / match["file"]
    if file.suffix == ".svg":
        return file.read_text(encoding="utf-8")
    picture = base64.b64encode(file.read_bytes()).decode()
    return match[0].replace(match["file"], f"data:image/png;base64,{picture}")


def render(text: str) -> str:
    """Make HTML of Markdown with formulas, pictures and drawings."""
    formulas = [show_formula(match) for match in FORMULA.finditer(text)]
    text = FORMULA.sub(PLACEHOLDER, text)  # Markdown would take the _ of a formula for emphasis
    page = MarkdownIt("commonmark", {"xhtmlOut": True}).enable("table").render(text)
    for formula in formulas:
        page = page.replace(PLACEHOLDER, formula, 1)
    return IMAGE.sub(embed_image, page)


def render_line(text: str) -> str:
    """Make HTML of a line of Markdown, without a paragraph around it."""
    return render(text).removeprefix("<p>").removesuffix("</p>\n")


def read_head(head: str) -> tuple[str, list[str], list[str]]:
    """Read the lines at the top of a section -> its heading, what is shown, its tests. Raises
    ValueError."""
    head = re.sub(r"\n +", " ", head)  # an indented line continues the one above
    heading, *lines = head.splitlines()
    code, tests = [], []
    for line in lines:
        kind, _, entry = line.partition(": ")
        if kind == "code":
            code += entry.split(", ")
        elif kind == "test":
            tests.append(entry)
        else:
            raise ValueError(f"section {heading!r}: {line!r} is neither `code:` nor `test:`")
    return heading, code, tests


def show_section(script: str, section: str) -> tuple[str, str]:
    """Make HTML of a section of a source -> its line in the contents, the section itself."""
    head, _, text = section.partition("\n\n")
    heading, code, tests = read_head(head)
    anchor = re.sub(r"\W+", "-", heading.lower()).strip("-")
    title = render_line(heading)
    argument = f"<h2>{title}</h2>{render(text)}{show_tests(tests)}"
    body = f'<div class="argument">{argument}</div>'
    if code:
        body += f'<div class="beside">{show_code(script, code)}</div>'
    line = f'<li><a href="#{anchor}">{title}</a></li>'
    return line, f'<section id="{anchor}">{body}</section>'


def page_style() -> str:
    """Get the style of a page: style.css, and the colours of code in both colour schemes."""
    style = (DOCS / "style.css").read_text(encoding="utf-8")
    for scheme, colours in SCHEMES.items():
        rules = HtmlFormatter(style=colours).get_style_defs(".code")
        style += f"@media (prefers-color-scheme: {scheme}) {{\n{rules}\n}}\n"
    return style


def make(name: str) -> str:
    """Make the page of docs/<name>.md. Raises ValueError."""
    top, *sections = (DOCS / f"{name}.md").read_text(encoding="utf-8").split("\n## ")
    title, _, top = top.partition("\n")
    title = html.escape(title.removeprefix("# "))
    contents, bodies = [], []
    for section in sections:
        line, body = show_section(f"{name}.py", section)
        contents.append(line)
        bodies.append(body)
    return ('<!DOCTYPE html>\n<html lang="en"><head>'
            f'<meta charset="utf-8"/><title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            f"<style>\n{page_style()}</style></head>\n"
            f"<body><header><h1>{title}</h1>\n{render(top)}"
            f"<nav><ol>{''.join(contents)}</ol></nav></header>\n"
            f"{''.join(bodies)}\n</body></html>\n")


def main() -> int:
    """Make both pages -> exit status: 0; 2, with the reason on stderr, if a source is wrong."""
    pages = {}
    try:
        for name in PAGES:
            pages[name] = make(name)
    except (ValueError, OSError) as error:
        print(f"beside.py: error: {error}", file=sys.stderr)
        return 2
    for name, page in pages.items():
        (DOCS / f"{name}.html").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
