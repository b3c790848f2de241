"""docs/how_it_works.md says what is true: its blocks run, print what they say, and its files and links are there."""

import re

from test_examples import ROOT, promised

import jgd.rules

GUIDE = (ROOT / "docs" / "how_it_works.md").read_text()
PACKAGE = ROOT / "src" / "jgd"
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)


def test_the_guide_prints_what_it_says(capsys):
    names: dict = {}
    checked = 0
    for block in BLOCKS:
        exec(compile(block, "how_it_works.md", "exec"), names)
        lines = promised(block)
        assert capsys.readouterr().out.splitlines() == lines, block
        checked += len(lines)
    assert checked >= 20


def test_the_files_that_the_guide_names_are_there():
    named = set(re.findall(r"`([\w./]+\.py)`", GUIDE))
    missing = [
        name for name in named if not any((base / name).is_file() for base in (PACKAGE / "_engine", PACKAGE))
    ]
    assert len(named) > 30
    assert missing == []


def test_the_glossary_is_in_order_and_names_a_file_for_each_term():
    rows = re.findall(
        r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", GUIDE.split("## 8. Glossary")[1], flags=re.MULTILINE
    )
    terms = [term for term, _, _ in rows[2:]]
    assert len(terms) > 30
    assert terms == sorted(terms, key=str.lower)
    assert all(".py`" in file for _, _, file in rows[2:])


def test_the_guide_names_every_capability_of_a_rule():
    table = GUIDE.split("### What each capability buys")[1].split("## 8.")[0]
    capabilities = {
        name for name, x in vars(jgd.rules.Rule).items() if isinstance(x, property) and name != "factor_sizes"
    }
    assert len(capabilities) > 7
    assert {name for name in capabilities if f"`{name}`" not in table} == set()


def test_the_links_of_the_guide_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    assert targets
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []
