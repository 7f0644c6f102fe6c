r"""Make docs/ddpo.html and docs/dpok.html, each paper's argument next to its code, from
docs/ddpo.md and docs/dpok.md.

    pip install -r docs/requirements.txt
    python docs/beside.py

A source is Markdown with LaTeX between dollar signs; {Eq. 2} after $$...$$ is the number of the
equation, and \allowbreak in it a place where a narrow page may begin a new line. The title "7 rows"
of a picture makes it a strip: four images in each row, which a wide page shows as columns. The
lines directly below the heading of a section name its code and the tests that prove it. An indented
line continues the one above:

    code: step_distribution, train[rollout = sample ... reward = gather]
    below: experiments/rwr.py:weights
    same: log_prob
    test: test_the_policys_step_is_ddims_step_at_every_timestep:
        a wrong coefficient, timestep or variance anywhere along the chain

Code after `code:` is shown next to the text, code after `below:` below the text. A name stands for
the whole function or class of the page's script or, after `FILE.py:`, of another. With brackets, it
stands for the lines from the first that has one text to the next that has the other. A name after
`same:` is a function with the same text as in ddpo.py, and becomes a link to DDPO's page. After the
name of a test stands what it would catch. A name that does not exist is an error.

A page is one file with its style, pictures and drawings in it. It needs no network and no script.
"""
import ast
import base64
import html
import re
import sys
from functools import cache
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = ("ddpo", "dpok")
TESTS = ("test_ddpo.py", "tests/test_experiments.py", "tests/test_gpu.py", "tests/test_shapes.py")
KINDS = ("code", "below", "same", "test")  # of the lines below the heading of a section
COLUMNS = 4  # images in a row of a strip
COLOURS = {  # media: the colours of code
    "print, (prefers-color-scheme: light)": "default",
    "screen and (prefers-color-scheme: dark)": "github-dark"}

FORMULA = re.compile(
    r"\$\$(?P<display>.+?)\$\$(?:\s*\{(?P<number>.+?)\})?"
    r"|\$(?P<inline>[^$\n]+)\$(?P<punctuation>[.,;:)]*)", re.DOTALL)
IMAGE = re.compile(r'<img src="(?P<file>[^"]+)"[^>]*/>')
STRIP = re.compile(
    r'<p><img src="(?P<file>[^"]+)" alt="(?P<alt>[^"]*)" title="(?P<rows>\d+) rows" /></p>')
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


@cache
def highlight_lines(file: str) -> list[str]:
    """Highlight a script -> HTML of each of its lines."""
    return highlight(read(file), PythonLexer(), HtmlFormatter(nowrap=True)).splitlines()


def show_line(number: int, text: str, highlighted: str) -> str:
    """Make HTML of a line of code with its number. --indent says how far a new line is indented."""
    indent = len(text) - len(text.lstrip())
    return (f'<span class="line" style="--indent: {indent}">'
            f'<span class="linenos">{number:4}</span> {highlighted}\n</span>')


def show_code(script: str, entries: list[str]) -> str:
    """Make HTML of parts of scripts: highlighted, each line with its number."""
    figures = []
    for entry in entries:
        file = script
        if ".py:" in entry:
            file, _, entry = entry.partition(":")
        first, last = locate(file, entry)
        lines = read(file).splitlines()
        highlighted = highlight_lines(file)
        code = ""
        for number in range(first, last + 1):
            code += show_line(number, lines[number - 1], highlighted[number - 1])
        name, bracket, _ = entry.partition("[")
        anchor = "" if bracket else f' id="{name}"'
        link = f'<a href="../{file}">{file}</a>'
        caption = f"{link}, lines {first} to {last}: <code>{name}</code>"
        figures.append(f"<figure{anchor}><figcaption>{caption}</figcaption>"
                       f'<pre class="code">{code}</pre></figure>')
    return "\n".join(figures)


def show_same(script: str, entries: list[str]) -> str:
    """Make HTML of links to DDPO's page, to functions that have the same text there. Raises
    ValueError."""
    if not entries:
        return ""
    links = []
    for name in entries:
        texts = []
        for file in (script, "ddpo.py"):
            first, last = locate(file, name)
            texts.append(read(file).splitlines()[first - 1:last])
        if texts[0] != texts[1]:
            raise ValueError(f"{name!r} of {script} is not that of ddpo.py")
        links.append(f'<a href="ddpo.html#{name}"><code>{name}</code></a>')
    return f'<p class="same">As in ddpo.py, shown on its page: {", ".join(links)}</p>'


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
        math = convert(tex, display="inline")
        return f'<span class="inline">{math}{match["punctuation"]}</span>'
    parts = [convert(part, display="block") for part in tex.split(r"\allowbreak")]
    equation = f'<span class="formula">{"<wbr/>".join(parts)}</span>'
    if match["number"]:
        equation += f'<span class="number">{match["number"]}</span>'
    return f'<span class="equation">{equation}</span>'


def embed_image(match: re.Match) -> str:
    """Make HTML with a drawing or a picture in it, from HTML that names its file."""
    file = DOCS / match["file"]
    if file.suffix == ".svg":
        return file.read_text(encoding="utf-8")
    return match[0].replace(match["file"], embed_png(file))


def embed_png(file: Path) -> str:
    """Make the address of a picture that has the picture in it."""
    picture = base64.b64encode(file.read_bytes()).decode()
    return f"data:image/png;base64,{picture}"


def show_strip(match: re.Match) -> str:
    """Make HTML of a strip, from HTML that names its file: each image is cut out of the picture,
    with its caption below it, so that style.css can arrange them."""
    file = DOCS / match["file"]
    with Image.open(file) as picture:
        width, height = picture.size
    name = file.stem
    side = width // COLUMNS  # of an image
    pitch = height // int(match["rows"])  # from one row to the next; the caption has the rest
    cells = ""
    for y in range(0, height, pitch):
        for x in range(0, width, side):
            image = f"{x} {y} {side} {side}"
            caption = f"{x} {y + side} {side // 2} {pitch - side}"  # its right half is empty
            cells += (f'<div><svg viewBox="{image}"><use href="#{name}"/></svg>'
                      f'<svg class="caption" viewBox="{caption}"><use href="#{name}"/></svg></div>')
    return (f'<svg class="source"><image id="{name}" width="{width}" height="{height}" '
            f'href="{embed_png(file)}"/></svg>'
            f'<div class="strip" role="img" aria-label="{match["alt"]}">{cells}</div>')


def render(text: str) -> str:
    """Make HTML of Markdown with formulas, pictures and drawings."""
    formulas = [show_formula(match) for match in FORMULA.finditer(text)]
    text = FORMULA.sub(PLACEHOLDER, text)  # Markdown would take the _ of a formula for emphasis
    page = MarkdownIt("commonmark", {"xhtmlOut": True}).enable("table").render(text)
    for formula in formulas:
        page = page.replace(PLACEHOLDER, formula, 1)
    page = STRIP.sub(show_strip, page)
    return IMAGE.sub(embed_image, page)


def render_line(text: str) -> str:
    """Make HTML of a line of Markdown, without a paragraph around it."""
    return render(text).removeprefix("<p>").removesuffix("</p>\n")


def read_head(head: str) -> tuple[str, dict[str, list[str]]]:
    """Read the lines at the top of a section -> its heading, {kind: entries}. Raises ValueError."""
    head = re.sub(r"\n +", " ", head)  # an indented line continues the one above
    heading, *lines = head.splitlines()
    entries = {kind: [] for kind in KINDS}
    for line in lines:
        kind, _, text = line.partition(": ")
        if kind not in KINDS:
            raise ValueError(f"section {heading!r}: {line!r} begins with none of {KINDS}")
        if kind == "test":
            entries[kind].append(text)
        else:
            entries[kind] += text.split(", ")
    return heading, entries


def show_section(script: str, section: str) -> tuple[str, str]:
    """Make HTML of a section of a source -> its line in the contents, the section itself."""
    head, _, text = section.partition("\n\n")
    heading, entries = read_head(head)
    anchor = re.sub(r"\W+", "-", heading.lower()).strip("-")
    title = render_line(heading)
    parts = {
        "argument": (f"<h2>{title}</h2>{render(text)}{show_same(script, entries['same'])}"
                     f"{show_tests(entries['test'])}"),
        "beside": show_code(script, entries["code"]),
        "below": show_code(script, entries["below"])}
    body = ""
    for part, content in parts.items():
        if content:
            body += f'<div class="{part}">{content}</div>'
    line = f'<li><a href="#{anchor}">{title}</a></li>'
    return line, f'<section id="{anchor}">{body}</section>'


def page_style() -> str:
    """Get the style of a page: style.css, and the colours of code."""
    style = (DOCS / "style.css").read_text(encoding="utf-8")
    for media, colours in COLOURS.items():
        rules = HtmlFormatter(style=colours).get_style_defs(".code")
        style += f"@media {media} {{\n{rules}\n}}\n"
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
