"""The report: one HTML file that needs nothing beside itself."""

import html
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

import jgd
from jgd._demo.section import Check, Picture, Section, Table
from jgd._demo.style import svg_uri
from jgd._demo.tour import Visit

STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --blue: #2563a8; --good: #2e8b57; --bad: #b8323a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
header h1 { margin: 0 0 .3rem; font-size: 2rem; }
header p { margin: .2rem 0; color: var(--soft); }
section, nav { background: white; border: 1px solid var(--line); border-radius: 10px;
  padding: 1.4rem 1.8rem; margin-top: 1.4rem; }
nav ol { margin: 0; padding-left: 1.3rem; }
nav li { margin: .3rem 0; }
nav a { color: var(--blue); text-decoration: none; }
nav a:hover { text-decoration: underline; }
h2 { margin: 0 0 .4rem; font-size: 1.35rem; }
.claim { margin: 0 0 1rem; font-size: 1.08rem; color: var(--blue); }
.time { float: right; color: var(--soft); font-size: .85rem; margin-top: .35rem; }
ul.checks { list-style: none; margin: 1rem 0; padding: .7rem 1rem; background: #f0f7f3;
  border-left: 4px solid var(--good); border-radius: 4px; }
ul.checks.fails { background: #fbf0f0; border-left-color: var(--bad); }
ul.checks li { padding-left: 1.5rem; text-indent: -1.5rem; margin: .25rem 0; }
.mark { display: inline-block; width: 1.5rem; text-indent: 0; font-weight: bold; color: var(--good); }
.mark.no { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; padding-bottom: .3rem; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid #cbd2d9; }
figure { margin: 1.4rem 0 .4rem; }
figure img { width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 62rem; }
@media print { body { background: white; } section, nav { break-inside: avoid; border: none; } }
"""


def render(visits: Sequence[Visit]) -> str:
    """The whole report as HTML; the pictures are drawn here and held inside it."""
    items = "".join(
        f'<li><a href="#s{k}">{_text(v.section.title)}</a> '
        f"{_mark(v.section.holds) if v.section.checks else ''}</li>"
        for k, v in enumerate(visits, 1)
    )
    device = jax.devices()[0]
    made_on = (
        f"jgd {jgd.__version__}, jax {jax.__version__}, Python {platform.python_version()}; "
        f"{device.platform}, "
        f"{os.cpu_count()} cores; {sum(v.seconds for v in visits):.0f} s in all"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jgd: the tour</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>jgd: the tour</h1>
<p>{_text(jgd.__doc__ or "")}</p>
<p>Every figure on this page was computed when it was made: {_text(made_on)}.</p>
</header>
<nav><ol>{items}</ol></nav>
{"".join(_section(k, visit) for k, visit in enumerate(visits, 1))}
</main>
</body>
</html>
"""


def write(path: Path, text: str) -> None:
    """Writes the file whole or not at all: beside its place first, then moved there."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # `mkstemp` lets only the owner read; the report gets what a file made by `open` would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _section(number: int, visit: Visit) -> str:
    section = visit.section
    return (
        f'<section id="s{number}"><span class="time">{visit.seconds:.1f} s</span>'
        f"<h2>{number}. {_text(section.title)}</h2>"
        f'<p class="claim">{_text(section.claim)}</p>'
        + "".join(f"<p>{_text(paragraph)}</p>" for paragraph in section.text)
        + _checks(section)
        + "".join(_figure(picture) for picture in section.pictures)
        + "".join(_table(table) for table in section.tables)
        + "</section>\n"
    )


def _checks(section: Section) -> str:
    if not section.checks:
        return ""
    return (
        f'<ul class="checks{"" if section.holds else " fails"}">{"".join(map(_check, section.checks))}</ul>'
    )


def _check(check: Check) -> str:
    return f"<li>{_mark(check.holds)}{_text(check.statement)}</li>"


def _mark(holds: bool) -> str:
    return '<span class="mark">✓</span>' if holds else '<span class="mark no">✗</span>'


def _figure(picture: Picture) -> str:
    caption = _text(picture.caption)
    return (
        f'<figure><img src="{svg_uri(picture)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{_text(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)
