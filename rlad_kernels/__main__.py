"""``python -m rlad_kernels``: what the machine has (doctor), how many tokens fit (plan), which methods there are (methods)."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import Any

from rlad_kernels import __version__
from rlad_kernels.losses.methods import FAMILIES, METHODS
from rlad_kernels.tools import doctor, plan


def methods(name: str | None) -> str:
    """A line a method, family by family; or of one what ``help(METHODS[name])`` says.

    Raises:
        ValueError: for a name that is none.
    """
    if name is not None:
        if name not in METHODS:
            raise ValueError(f"methods: name must be one of {', '.join(METHODS)}, got {name!r}")
        return METHODS[name].__doc__ or ""
    lines, width = [], max(map(len, METHODS)) + 2
    for family in FAMILIES:
        found = sorted((m for m in METHODS.values() if m.family == family), key=lambda m: type(m.loss).__module__)
        lines += [f"\n{family}", f"{'':<{width}}{'products':<10}{'learns from':<13}{'needs':<10}formula"]
        room = max(shutil.get_terminal_size((132, 24)).columns - width - 33, 40)
        for m in found:
            formula = textwrap.shorten(m.formula, room, placeholder=" …")
            lines.append(f"{m.name:<{width}}{m.products:<10}{m.signal:<13}{m.access:<10}{formula}")
    return "\n".join(
        [*lines, "\npython -m rlad_kernels methods NAME says how one is called, from which paper, and what goes wrong."]
    ).strip()


def main(argv: list[str]) -> int:
    """Run a command; without one the doctor."""
    parser = argparse.ArgumentParser(prog="python -m rlad_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"rlad_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{doctor,plan,methods}")
    commands.add_parser("doctor", help="what this machine has, what is missing and the command that fixes it (the default)")
    plan.add_arguments(commands.add_parser("plan", help="how many tokens fit into how much memory", description=plan.__doc__))
    listed = commands.add_parser("methods", help="the published methods, or all of one")
    listed.add_argument("name", nargs="?", help="one of rlad_kernels.METHODS")
    args: Any = parser.parse_args(argv)
    try:
        if args.command == "plan":
            print(plan.answer(args))
        elif args.command == "methods":
            print(methods(args.name))
        else:
            return doctor.main()
    except ValueError as error:
        commands.choices[args.command].error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
