"""The command `jgd`: a tour on real data, and a benchmark on this device."""

import argparse
import sys
from collections.abc import Sequence

import jgd
from jgd._bench import command as bench
from jgd._demo import command as demo


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar; each subcommand adds its own arguments."""
    parser = argparse.ArgumentParser(prog="jgd", description=jgd.__doc__)
    parser.add_argument("--version", action="version", version=f"jgd {jgd.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module, summary in (
        ("demo", demo, "a tour of the library on real data; writes a report to open in a browser"),
        ("bench", bench, "time and memory against the plain gradient and vmap(grad), on this device"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 where all went well, 1 where a claim did not hold or a dependency is missing,
        2 for arguments that make no sense.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except ImportError as error:
        print(f"jgd: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jgd: stopped", file=sys.stderr)
        return 130
