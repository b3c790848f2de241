"""The command `jgd`: dispatch, exit status, and errors before anything runs."""

import subprocess
import sys

import pytest

import jgd
from jgd import cli


@pytest.mark.parametrize("command", [[sys.executable, "-m", "jgd"], ["jgd"]])
def test_both_programs_print_the_version(command, tmp_path):
    if command == ["jgd"]:
        command = [sys.executable, "-c", "import sys; from jgd.cli import main; sys.exit(main())"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, f"jgd {jgd.__version__}")


def test_without_arguments_it_prints_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed and "bench" in printed and "usage: jgd" in printed


@pytest.mark.parametrize("arguments", [["nonsense"], ["demo", "--nonsense"], ["demo", "--out"]])
def test_arguments_that_make_no_sense_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: jgd" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "bench"])
def test_each_command_gets_its_arguments_and_gives_the_exit_status(name, monkeypatch):
    seen = []
    monkeypatch.setattr(getattr(cli, name), "run", lambda args: seen.append(args) or 7)
    assert cli.main([name]) == 7
    assert len(seen) == 1


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo", "--out", str(tmp_path / "report")]) == 1
    assert "pip install 'jgd[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_interrupting_prints_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "jgd: stopped\n"
