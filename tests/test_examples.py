"""The README and the examples say what is true: the README's blocks and every example are run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jgd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DEMO = "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]' && .venv/bin/jgd demo"
TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def promised(block: str) -> list[str]:
    """What a block's comments say that it prints: after a `print(...)`, or on the lines that follow it."""
    after = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    return after or re.findall(r"^# (.*)$", block, flags=re.MULTILINE)


def test_the_readme_gives_the_two_commands_and_ci_runs_the_one_for_tests():
    assert [block.strip() for block in blocks("bash")] == [DEMO, TEST]
    ci = (ROOT / ".ci" / "run").read_text()
    found = [line for line in README.splitlines() if ".venv/bin/pytest" in line]
    assert "grep -m1 -F '.venv/bin/pytest' README.md" in ci
    assert found == [TEST]


def test_the_first_example_takes_about_ten_lines():
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


def test_the_readme_prints_what_it_says(capsys):
    names: dict = {}
    checked = 0
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
        lines = promised(block)
        assert capsys.readouterr().out.splitlines() == lines, block
        checked += len(lines)
    assert checked >= 5


def test_the_readme_links_to_files_that_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (ROOT / target).exists()] == []
    assert {f"examples/{file.name}" for file in EXAMPLES} <= set(local)


def test_the_readme_names_every_reduction():
    reductions = {
        name
        for name in dir(jgd)
        if getattr(getattr(jgd, name), "__module__", "").startswith("jgd._reductions")
    }
    assert {name for name in reductions if name[0].islower() and f"`jgd.{name}(" not in README} == set()


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_example_runs(file, tmp_path):
    # Its own process, as a user runs it, without the flags that make the tests compile quickly.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
