"""`jgd demo`: what it prints, the report it writes, and what it refuses."""

import base64
import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from functools import partial
from html.parser import HTMLParser

import jax
import numpy as np
import optax
import pytest
from internals import Check, Picture, Section, Stop, Table, Visit, prices, recorded, style, terminal, tour
from internals import demo_command as command
from internals import demo_report as report

import jgd
from jgd import cli


class Page(HTMLParser):
    """The tags, attributes and text of a page; complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def draw_line(figure):
    figure.subplots().plot([0, 1], [0, 1])


FINE = Section(
    "A <title> & more",
    "A claim.",
    ("One paragraph.",),
    checks=(Check("One is below two: 1 < 2", True),),
    tables=(Table("Figures", ("name", "value"), (("first", "1.0"), ("the second", "20.0"))),),
    pictures=(Picture('A "line"', draw_line, (3, 2)),),
)
FAILING = dataclasses.replace(FINE, title="Another", checks=(Check("Two is below one", False),))


def stops_of(*sections: Section) -> tuple[Stop, ...]:
    return tuple(Stop(section.title, lambda quick, section=section: section) for section in sections)


@pytest.fixture
def short_tour(monkeypatch):
    """A tour that takes no time; what it goes through is given by the test."""

    def use(*sections: Section) -> None:
        monkeypatch.setattr(tour, "STOPS", stops_of(*sections))

    return use


# CI asks it: it takes as long as a hundred others.
of_the_whole_tour = lambda test: pytest.mark.slow(pytest.mark.sample(test))


# --- The tour itself, once, in its quick form.


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Exit status, printed text, report and sections of `jgd demo --quick`."""
    out, visited = tmp_path_factory.mktemp("demo") / "new" / "report", []
    with pytest.MonkeyPatch.context() as patch:
        lines, run = [], tour.run

        def kept(**options):
            for visit in run(**options):
                visited.append(visit.section)
                yield visit

        patch.setattr(tour, "run", kept)
        patch.setattr("builtins.print", lambda *args, **_: lines.append(" ".join(map(str, args))))
        status = cli.main(["demo", "--quick", "--out", str(out)])
    return status, "\n".join(lines), (out / "report.html").read_text(encoding="utf-8"), visited


@of_the_whole_tour
def test_the_tour_holds(quick):
    status, printed, _, _ = quick
    assert "FAILS" not in printed
    assert status == 0
    assert re.search(r"(\d+) of \1 checks hold\.", printed)


@of_the_whole_tour
def test_the_published_figures_are_printed(quick):
    _, printed, _, _ = quick
    for figure in ("938.2379", "2548.07", "0.47", "475"):
        assert figure in printed


@of_the_whole_tour
def test_the_report_needs_nothing_beside_itself(quick):
    _, _, text, _ = quick
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith("data:image/svg+xml;base64," if tag == "img" else "#"), (tag, value[:40])
    assert "url(" not in text and "@import" not in text


@of_the_whole_tour
def test_every_picture_of_the_report_is_a_drawing(quick):
    page = Page(quick[2])
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(sources) == 9
    for source in sources:
        root = ElementTree.fromstring(base64.b64decode(source.split(",", 1)[1]))
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 50


@of_the_whole_tour
def test_terminal_and_report_say_the_same(quick):
    _, printed, text, _ = quick
    page, flat = Page(text), " ".join(printed.split())
    for title in re.findall(r"(?m)^(.+)\n=+$", printed):
        assert title in page.text
    assert page.tags.count("section") == len(tour.STOPS) == len(re.findall(r"(?m)^=+$", printed))
    for statement in re.findall(r'<li><span class="mark">✓</span>(.*?)</li>', text):
        assert Page(statement).text in flat


# --- Rendering, on a tour that takes no time.


def test_a_check_that_fails_is_marked_and_turns_the_exit_status(short_tour, tmp_path, capsys):
    short_tour(FINE, FAILING)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "holds One is below two" in printed and "FAILS Two is below one" in printed
    assert "1 of 2 checks hold" in printed
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<span class="mark no">✗</span>') == 2  # in the list of sections, and at the check


def test_text_is_escaped(short_tour, tmp_path):
    short_tour(FINE)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A &lt;title&gt; &amp; more" in text and "<title> &" not in text
    assert 'alt="A &quot;line&quot;"' in text
    assert "A <title> & more" in Page(text).text


def test_plain_tables_line_up(capsys):
    terminal.PlainScreen().show(Visit(FINE, 1.0))
    lines = capsys.readouterr().out.split("\n")
    rows = [line for line in lines if line.startswith(("  name", "  first", "  the second"))]
    assert [len(row) for row in rows] == [len(rows[0])] * 3
    assert rows[2].endswith("20.0") and rows[1].startswith("  first  ")
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_rich_text(short_tour, tmp_path, capsys, monkeypatch):
    short_tour(FINE, FAILING)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "✓" in printed and "✗" in printed and "─" in printed
    assert "A <title> & more" in printed and "the second" in printed


def test_a_picture_is_drawn_the_same_twice():
    assert style.svg_uri(FINE.pictures[0]) == style.svg_uri(FINE.pictures[0])


# --- What it refuses, before anything runs.


def test_an_out_that_is_a_file_is_refused(monkeypatch, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setattr(tour, "run", lambda **_: pytest.fail("the tour ran"))
    assert cli.main(["demo", "--out", str(file)]) == 2
    error = capsys.readouterr().err
    assert "`--out`" in error and str(file) in error and "is a file" in error
    assert file.read_text() == "mine"


def test_an_out_that_cannot_be_made_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tour, "run", lambda **_: pytest.fail("the tour ran"))
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_to_is_refused(monkeypatch, tmp_path, capsys):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(tour, "run", lambda **_: pytest.fail("the tour ran"))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_the_default_directory_is_jgd_report(short_tour, monkeypatch, tmp_path):
    short_tour(FINE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    assert [path.name for path in (tmp_path / "jgd-report").iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_finished_leaves_the_old_one(monkeypatch, tmp_path):
    path = tmp_path / "report.html"
    report.write(path, "old")

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report.os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        report.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_can_be_read_by_others(tmp_path):
    ours, plain = tmp_path / "report.html", tmp_path / "plain"
    report.write(ours, "text")
    plain.write_text("text")
    assert ours.stat().st_mode == plain.stat().st_mode


# --- Parts.


def test_the_recorded_path_is_the_path():
    seen = []
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    fit = partial(
        jgd.fit, params=np.float32(0), data=(x, 3 * x), batch_size=2, epochs=3, key=jax.random.key(0)
    )

    def loss(w, x, y):
        return 0.5 * (x * w - y) ** 2

    path = fit(jgd.descent(loss, recorded(optax.sgd(0.5, momentum=0.9), steps=12))).state.opt_state.path

    def watch(state, _):
        return seen.append(float(state.params))

    fit(jgd.descent(loss, optax.sgd(0.5, momentum=0.9)), callback=watch)
    np.testing.assert_allclose(path, [0.0, *seen], rtol=1e-6)
    assert len(set(seen)) == 12


@of_the_whole_tour
def test_prices_are_of_the_three_quantities_by_both_methods(quick):
    (table,) = next(
        t
        for stop, t in zip(tour.STOPS, (s.tables for s in quick[3]), strict=True)
        if stop.compute is prices.section
    )
    names = [row[0] for row in table.rows]
    assert names[0] == "sum, plain gradient"
    assert set(names[1:]) == {f"{q}, {m}" for q in prices.QUANTITIES for m in prices.METHODS}
    assert all(float(row[1].split()[0]) > 0 for row in table.rows)
