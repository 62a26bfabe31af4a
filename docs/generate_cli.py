"""Write docs/cli.md from the command line's own help: `make docs-cli`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from moepack.cli import cli

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 96
INTRODUCTION = """\
# Command line

<!-- Written by docs/generate_cli.py from the programs' own help: run `make docs-cli`. -->

Results go to stdout; progress, logs and errors go to stderr. Sizes are written like `6GiB`,
`512MiB` or a number of bytes. An error is one line: what went wrong, where, what to do next;
`--debug` adds the traceback.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | usage |
| 3 | not a valid pack |
| 4 | integrity: the pack's or the source's data are damaged |
| 5 | input/output and resources: disk, memory, permissions |
| 6 | network and the Hub |
| 130 | interrupted |
"""


def contexts(
    command: click.Command, parent: click.Context | None = None
) -> Iterator[click.Context]:
    """Yield a context for a command and, in alphabetical order, for all of its subcommands."""
    name = "moepack" if parent is None else command.name
    context = click.Context(command, parent, info_name=name, **command.context_settings)
    # Without a fixed width the help follows the terminal it is printed on.
    context.terminal_width = context.max_content_width = WIDTH
    yield context
    if isinstance(command, click.Group):
        for sub_name in sorted(command.list_commands(context)):
            sub_command = command.get_command(context, sub_name)
            if sub_command is not None and not sub_command.hidden:
                yield from contexts(sub_command, context)


def render() -> str:
    """Return the text that docs/cli.md should have."""
    sections = [INTRODUCTION]
    for context in contexts(cli):
        # Help wraps long lines with trailing blanks in places.
        lines = (line.rstrip() for line in context.command.get_help(context).splitlines())
        text = "\n".join(lines)
        sections.append(f"## {context.command_path}\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
