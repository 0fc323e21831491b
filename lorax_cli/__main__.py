"""`lorax COMMAND ...`, also as `python -m lorax_cli COMMAND ...`."""

import difflib
import importlib.metadata
import runpy
import sys
import textwrap

import lorax_cli


def main() -> None:
    """Runs the subcommand's program with the arguments that follow it."""
    given, *arguments = sys.argv[1:] or ["--help"]
    if given in ("-h", "--help", "help"):
        print(usage())
    elif given in ("-V", "--version", "version"):
        print(importlib.metadata.version("lorax-flax"))
    elif given in lorax_cli.COMMANDS:
        # As `python -m` does, but with the programs' own folder first; the working
        # directory stays on the path, so that plugins can be named from it.
        sys.path[:1] = [str(lorax_cli.ROOT), ""]
        sys.argv = [f"lorax {given}", *arguments]
        told = {"COMMAND": f"lorax {given}"}
        runpy.run_module(lorax_cli.module(given), told, "__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(given, lorax_cli.COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        known = ", ".join(lorax_cli.COMMANDS)
        sys.exit(f"lorax: {given} is not a command{hint} The commands are {known}")


def usage() -> str:
    """Returns one screen of help: the commands, the configs, and where to read on."""
    rows = [f"  {name:<10}{does}" for name, does in lorax_cli.COMMANDS.items()]
    configs = textwrap.wrap(", ".join(lorax_cli.configs()), 76)
    return "\n".join(
        [
            "usage: lorax COMMAND [--flag=value ...]",
            "",
            *rows,
            "",
            "lorax COMMAND --help lists its flags. --config takes a file, or the name",
            "of a config that comes with lorax:",
            "",
            *(f"  {line}" for line in configs),
            "",
            "  lorax run --config=quickstart:runlocal --config.adapter.rank=4",
        ]
    )


if __name__ == "__main__":
    main()
