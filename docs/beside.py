"""Make docs/ddpo.html and docs/dpok.html, each paper's argument beside its code, of docs/ddpo.md and dpok.md.

    pip install -r docs/requirements.txt
    python docs/beside.py

A source is Markdown with LaTeX between dollar signs; {Eq. 2} after $$...$$ is its number. Below the heading
of a section stand, each checked, what is shown beside it and what proves it:

    code: step_distribution, train[rollout = sample ... log.append]   whole, or from one text to another
    test: test_the_policys_step_is_ddims_step: what it would catch

A page is one file, with its style, pictures and drawings in it; it needs no network and no script.
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

HERE = Path(__file__).resolve().parent
TESTS = "test_ddpo.py", "experiments/test_experiments.py", "experiments/test_gpu.py", "shapes/test_shapes.py"


def definitions(file):
    """{name: (first line, last line)} of the functions and classes of a file."""
    found = {}
    for node in ast.parse((HERE.parent / file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = first, node.end_lineno
    return found


def locate(file, entry):
    """`name` or `name[text ... text]` -> (first line, last line). Raises ValueError."""
    name, _, span = entry.removesuffix("]").partition("[")
    if name not in (places := definitions(file)):
        raise ValueError(f"{file} has no {name!r}")
    (first, last), lines = places[name], (HERE.parent / file).read_text(encoding="utf-8").splitlines()
    ends = [first]
    for text in span.split(" ... ") if span else ():
        ends.append(next((n for n in range(ends[-1], last + 1) if text in lines[n - 1]), 0))
        if not ends[-1]:
            raise ValueError(f"{file}: {name} has no line with {text!r} from line {ends[-2]} on")
    return (ends[1], ends[2]) if span else (first, last)


def show_code(file, entries):
    """The named parts of a script, highlighted, each with its line numbers."""
    whole = (HERE.parent / file).read_text(encoding="utf-8")
    lines, blocks = highlight(whole, PythonLexer(), HtmlFormatter(nowrap=True)).splitlines(), []
    for entry in entries:
        first, last = locate(file, entry)
        numbered = "\n".join(f'<span class="linenos">{n:4}</span> {lines[n - 1]}'
                             for n in range(first, last + 1))
        blocks.append(f'<figure><figcaption><a href="../{file}">{file}</a>, lines {first} to {last}: '
                      f'<code>{entry.partition("[")[0]}</code></figcaption>'
                      f'<pre class="code" tabindex="0">{numbered}</pre></figure>')
    return "\n".join(blocks)


def show_tests(lines):
    """`name: what it would catch` -> a list, each with its file and line. Raises ValueError."""
    items = []
    for name, _, catches in (line.partition(": ") for line in lines):
        files = [(file, definitions(file)[name][0]) for file in TESTS if name in definitions(file)]
        if not files:
            raise ValueError(f"no test is called {name!r}")
        file, line = files[0]
        title = name.removeprefix("test_").replace("_", " ")
        items.append(f'<li><a href="../{file}" title="{name}, line {line}">{title}</a>: {catches}</li>')
    heading = "<h3>Tested by, and what the test would catch</h3>"
    return f'<div class="proof">{heading}<ul>{"".join(items)}</ul></div>' if items else ""


def render(text):
    """Markdown with formulas, pictures and drawings -> HTML."""
    kept = []

    def keep(tex, display, number=""):
        math = convert(tex.strip(), display="block" if display else "inline")
        tag = f'<span class="number">{number}</span>' if number else ""
        kept.append(f'<span class="equation">{math}{tag}</span>' if display else math)
        return f"\ue000{len(kept) - 1}\ue001"

    text = re.sub(r"\$\$(.+?)\$\$(?:\s*\{(.+?)\})?", lambda m: keep(m[1], True, m[2] or ""), text, flags=re.S)
    text = re.sub(r"\$(.+?)\$", lambda m: keep(m[1], False), text)
    page = MarkdownIt("commonmark", {"xhtmlOut": True}).enable("table").render(text)
    page = re.sub("\ue000(\\d+)\ue001", lambda m: kept[int(m[1])], page)

    def inline(match):
        file = HERE / match[1]
        if file.suffix == ".svg":
            return file.read_text(encoding="utf-8")
        picture = base64.b64encode(file.read_bytes()).decode()
        return match[0].replace(match[1], f"data:image/png;base64,{picture}")

    return re.sub(r'<img src="([^"]+)"[^>]*/>', inline, page)


def make(name):
    """The page of docs/<name>.md."""
    top, *sections = (HERE / f"{name}.md").read_text(encoding="utf-8").split("\n## ")
    title, _, top = top.partition("\n")
    body, contents = [], []
    for section in sections:
        heading, _, text = section.partition("\n")
        anchor = re.sub(r"\W+", "-", heading.lower()).strip("-")
        code = [entry for line in re.findall(r"^code: (.+)\n", text, re.M) for entry in line.split(", ")]
        tests = re.findall(r"^test: (.+)\n", text, re.M)
        text = render(re.sub(r"^(?:code|test): .+\n", "", text, flags=re.M))
        beside = f'<div class="beside">{show_code(f"{name}.py", code)}</div>' if code else ""
        contents.append(f'<li><a href="#{anchor}">{render(heading)[3:-5]}</a></li>')
        body.append(f'<section id="{anchor}"><div class="argument"><h2>{render(heading)[3:-5]}</h2>{text}'
                    f"{show_tests(tests)}</div>{beside}</section>")
    style = (HERE / "style.css").read_text(encoding="utf-8")
    for scheme, pygments in ("light", "default"), ("dark", "github-dark"):
        rules = HtmlFormatter(style=pygments).get_style_defs(".code")
        style += f"@media (prefers-color-scheme: {scheme}) {{\n{rules}\n}}\n"
    title = html.escape(title.removeprefix("# "))
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f"<style>\n{style}</style></head>\n"
            f"<body><header><h1>{title}</h1>\n{render(top)}<nav><ol>{''.join(contents)}</ol></nav></header>\n"
            f"{''.join(body)}\n</body></html>\n")


def main():
    """Exit status 0; 2, with the reason on stderr, where a source names what is not there."""
    try:
        pages = {name: make(name) for name in ("ddpo", "dpok")}
    except (ValueError, OSError) as error:
        print(f"beside.py: error: {error}", file=sys.stderr)
        return 2
    for name, page in pages.items():
        (HERE / f"{name}.html").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
