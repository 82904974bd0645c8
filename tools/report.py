"""The HTML report of executed notebooks: a page each, the README and the docs as pages, and an index with the answers.

It needs no script and nothing from elsewhere: formulas are MathML, figures lie in the pages, what pages of the
repository link to is copied beside them. `tools/reproduce.py` calls `write_report`.
"""

import html
import os
import re
from datetime import datetime
from pathlib import Path
from posixpath import normpath, relpath

import nbformat
from jinja2 import DictLoader, pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from feddip_lite import doctor
from feddip_lite.records import provenance

ROOT = Path(__file__).resolve().parents[1]
INJECTED = "injected-parameters"  # papermill's own cell
COPIED = 2**18  # bytes: larger files are not copied, their links become plain words

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } p, li { max-width: 50rem; } a { color: #0b5cad; } img { max-width: 100%; }
pre { background: #f5f6f7; padding: .7rem; overflow-x: auto; font-size: .85rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top; }
.failed { color: #b00020; } .anchor-link { display: none; }
"""
# What a page of nbconvert lacks on a narrow screen: long lines and wide tables scroll, prose keeps to a readable width.
NARROW = """<style>
.jp-Notebook { max-width: 68rem; margin: 0 auto; padding: 0 .5rem; }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto; max-width: 100%; }
.jp-RenderedHTMLCommon p, .jp-RenderedHTMLCommon li { max-width: 50rem; }
.jp-CodeMirrorEditor, .highlight pre, .jp-OutputArea-output pre { overflow-x: auto; }
.jp-OutputArea-output img { max-width: 100%; height: auto; }
math { font-family: STIX Two Math, Cambria Math, Latin Modern Math, DejaVu Serif, serif; font-size: 1.08em; }
@media (max-width: 900px) { .jp-InputPrompt, .jp-OutputPrompt { display: none; } }
</style>"""
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block body_header %}{{ super() }}
NARROW
<p style="margin: 1em; font-family: sans-serif"><a href="index.html">All notebooks</a></p>{% endblock %}"""
PLAIN = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>{body}</body></html>
"""


class MathMLRenderer(IPythonRenderer):
    """Formulas as MathML, which browsers draw by themselves."""

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

    def block_html(self, html: str) -> str:
        """As it stands: looked through for images, an opening <details> would be closed at once."""
        return super().block_html(html) if "<img" in html else html


def mathml(tex: str, display: str) -> str:
    """A TeX formula as MathML, or as its own text where the converter is missing or does not understand it."""
    plain = re.sub(r"\\(begin|end)\{equation\*?\}", "", tex).replace("{aligned}", "{align*}")  # same, as it knows them
    plain = plain.replace(r"\lfloor", "⌊").replace(r"\rfloor", "⌋")
    try:
        from latex2mathml.converter import convert

        # Without the namespace: HTML needs none, and nbconvert would turn it into a prefix inside headings.
        return convert(plain.strip(), xmlns="", display=display).replace(' xmlns=""', "")
    except Exception:  # the converter raises a different error for every construct it does not know
        return f"<code>{html.escape(tex)}</code>"


def rendered(source: str, path: Path, **more) -> str:
    """Markdown as HTML, images in it; these are relative to the folder `path`."""
    renderer = MathMLRenderer(escape=False, embed_images=True, path=str(path), **more)
    return MarkdownWithMath(renderer=renderer).render(source)


class ReportExporter(HTMLExporter):
    """nbconvert's page without its scripts, with MathML, embedded images and a way back to the index."""

    @pass_context
    def markdown2html(self, context, source):
        path = context.get("resources", {}).get("metadata", {}).get("path", "")
        return rendered(source, path, attachments=context.get("cell", {}).get("attachments", {}))


def write_report(out: Path, sources: Path, profile: str, errors: dict[str, str]) -> Path:
    """Write one HTML page per executed copy in `out`, pages of the README and docs beside `sources`, and an index;
    returns the index."""
    exporter = ReportExporter(
        embed_images=True, extra_loaders=[DictLoader({"report.html.j2": PAGE.replace("NARROW", NARROW)})]
    )
    exporter.template_file = "report.html.j2"
    root, rows = sources.resolve().parent, []
    documents = [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]
    pages = {path: page_name(path, root) for path in documents}
    notebooks = [path for path in sorted(sources.resolve().glob("[0-9][0-9]_*.ipynb")) if (out / path.name).exists()]
    pages |= {path: f"{path.stem}.html" for path in notebooks}  # those of an earlier run, where --only left some out
    for source in notebooks:
        copy = out / source.name
        notebook = readable(nbformat.read(copy, as_version=4))
        resources = {"metadata": {"name": copy.stem, "path": str(sources)}}  # images are relative to the source
        page, _ = exporter.from_notebook_node(notebook, resources)
        copy.with_suffix(".html").write_text(linked(page, sources.resolve(), pages, out, root), encoding="utf-8")
        rows.append(index_row(copy.stem, notebook, errors.get(copy.stem)))
    for path in documents:
        body = '<p><a href="index.html">All notebooks</a></p>' + rendered(with_images_from(root, path), root)
        page = PLAIN.format(title=path.stem, style=STYLE, body=linked(body, path.parent, pages, out, root))
        (out / pages[path]).write_text(page, encoding="utf-8")
    where = f"feddip_lite {doctor.version('feddip-lite')} ({(provenance.commit() or 'no commit')[:12]}), "
    where += f"torch {doctor.version('torch')}, "
    where += f"{provenance.device_name()}, {os.cpu_count()} CPU cores; written {datetime.now():%Y-%m-%d %H:%M}"
    links = " · ".join(f'<a href="{pages[path]}">{path.stem}</a>' for path in documents)
    table = f"<table><tr><th>Notebook</th><th>Question and answer</th><th>Run time</th></tr>{''.join(rows)}</table>"
    body = f"<h1>FedDIP, reproduced: the {profile} profile</h1><p>{html.escape(where)}</p>{table}<p>{links}</p>"
    index = out / "index.html"
    index.write_text(PLAIN.format(title=f"feddip_lite: {profile}", style=STYLE, body=body), encoding="utf-8")
    return index


def with_images_from(root: Path, path: Path) -> str:
    """A page's Markdown, its images named from `root` on: nbconvert embeds none that lies outside its own folder."""

    def renamed(match: re.Match) -> str:
        return f"{match[1]}({relpath(path.parent / match[2], root)})"

    return re.sub(r"(!\[[^\]]*\])\(([^):]+)\)", renamed, path.read_text(encoding="utf-8"))


def page_name(path: Path, root: Path) -> str:
    """README.html, docs_design.html: all pages lie in one folder."""
    return "_".join(path.relative_to(root).with_suffix(".html").parts)


def readable(notebook: NotebookNode) -> NotebookNode:
    """An executed notebook without papermill's cell, each figure with the heading that it stands under as its words."""
    notebook.cells = [cell for cell in notebook.cells if INJECTED not in cell.metadata.get("tags", [])]
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) or [heading])[-1]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = {"alt": heading}
    return notebook


def linked(page: str, base: Path, pages: dict[Path, str], out: Path, root: Path) -> str:
    """A page with links that resolve in `out`: to other pages, and to copies of small files of the checkout `root`;
    links to anything else there become plain words. `base` is the folder that its links start from."""

    def resolve(match: re.Match) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or re.match(r"[a-z]+:", target) or target == "index.html":
            return match[0]
        path = Path(normpath(base / target))
        if path in pages:
            return f'href="{pages[path]}{"#" * bool(anchor)}{anchor}"'
        if root not in path.parents or not path.is_file() or path.stat().st_size > COPIED:
            return ""
        copy = out / "files" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        return f'href="{copy.relative_to(out).as_posix()}"'

    return re.sub(r'(?<=<a )href="([^"]*)"', resolve, page)


def index_row(name: str, notebook: NotebookNode, error: str | None) -> str:
    """The table row of one notebook: link, the question in its first heading, its answer, run time or error."""
    prose = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = (re.search(r"^# +(.+)$", source, re.MULTILINE) for source in prose)
    said = f"<b>{html.escape(next((match[1] for match in headings if match), ''))}</b>"
    if answer := answer_of(notebook):
        said += f"<br>{rendered(answer, ROOT).removeprefix('<p>').removesuffix('</p>')}"
    facts = notebook.metadata.get("papermill", {})
    seconds = facts.get("duration")
    took = f"{seconds:.1f} s" if seconds is not None else "not finished"
    if error or facts.get("exception"):
        took = '<span class="failed">failed</span>'
        said += f' <br><span class="failed">{html.escape(error or "an earlier run failed")}</span>'
    return f'<tr><td><a href="{name}.html">{name}</a></td><td>{said}</td><td>{took}</td></tr>'


def answer_of(notebook: NotebookNode) -> str:
    """The sentences after "Answer:" in a notebook's outputs; empty without."""
    for cell in reversed(notebook.cells):
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown", "")
            if text.startswith("**Answer:**"):
                return text.removeprefix("**Answer:**").strip()
    return ""
