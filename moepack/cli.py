"""The command line: finds a command, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import select
import sys
import traceback
from typing import Any

import click

import moepack

_COMMANDS = {
    "bench": "Measure decode and prefill speed of a pack.",
    "convert": "Convert a Mixture-of-Experts checkpoint into a pack.",
    "eval": "Measure the perplexity of a pack on a text, and its divergence from its source.",
    "generate": "Write text with a pack.",
    "inspect": "Show what a pack holds.",
    "plan": "Say which recipe fits this machine.",
    "pull": "Download a pack from the Hub.",
    "push": "Upload a pack to the Hub.",
    "serve": "Serve a pack with OpenAI's interface.",
    "simulate": "Compare cache sizes and policies on a routing trace.",
    "trace": "Record which experts a text uses.",
    "verify": "Check every byte of a pack.",
}

UNEXPECTED, INTERRUPTED = 1, 130

_DISGUISED: dict[str, OSError | MemoryError] = {
    "can't allocate memory": MemoryError(),
    "Too many open files": OSError(errno.EMFILE, ""),
}
"""What torch and safetensors say in errors that have no type of their own."""


class _Ended(Exception):
    """A command raised something that click takes for its own affair.

    Attributes:
        error: That.
    """

    def __init__(self, error: BrokenPipeError | EOFError | SystemExit) -> None:
        super().__init__(error)
        self.error = error


class _Commands(click.Group):
    """Imports a command's module only when it is used: `--help` never loads torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in alphabetical order."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"moepack.commands.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what click would end without a word is told apart by :func:`run`."""
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, EOFError, SystemExit) as error:
            raise _Ended(error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(None, "--version", package_name="moepack")
def cli() -> None:
    """Mixture-of-Experts models as packs: quantized, one record per expert, streamed from disk."""


def main() -> None:
    """Entry point of the `moepack` script."""
    _stand_in_for_closed_streams()
    sys.exit(run(sys.argv[1:]))


class _ClosedOutput(io.TextIOBase):
    """Stands for standard output that was closed before Python began."""

    def write(self, _: str) -> int:
        """Fails, as in other programs: Python's own None would lose the result without a word."""
        raise OSError(errno.EBADF, "it is closed", "standard output")


def _stand_in_for_closed_streams() -> None:
    """Take the places of standard streams that were closed before Python began.

    Otherwise the next file that is opened would be number 1, and what a library prints, in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    if sys.stderr is None:  # progress bars write to it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: Without the program's name.
    """
    debug = "--debug" in arguments
    try:
        cli.main(args=arguments, prog_name="moepack", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", INTERRUPTED, debug)
    except _Ended as ended:
        return _end(ended.error, debug)
    except moepack.MoepackError as error:
        return _complain(str(error), error.exit_code, debug)
    except SystemExit:  # click's, when its own output finds no reader
        return _end(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), debug)
    except (OSError, MemoryError) as error:
        return _complain(_resource_message(error), 5, debug)
    except Exception as error:
        for words, real in _DISGUISED.items():
            if words in str(error):
                return _complain(_resource_message(real), 5, debug)
        return _unexpected(error, debug)
    return 0


def _end(error: BrokenPipeError | EOFError | SystemExit, debug: bool) -> int:
    if isinstance(error, BrokenPipeError):
        # Nothing is wrong if the reader of our output has left, but any pipe may have broken.
        return 0 if _reader_has_left() else _complain(_resource_message(error), 5, debug)
    if isinstance(error, EOFError):  # the commands catch the end of what the user says
        return _unexpected(error, debug)
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    return _complain(str(error.code), UNEXPECTED, debug)


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more; if so, it goes nowhere now."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are always told
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)  # what is still in a buffer is written at the end
    os.close(nowhere)
    return True


def _unexpected(error: BaseException, debug: bool) -> int:
    first = next(iter(str(error).splitlines()), "")
    line = f"unexpected {type(error).__name__}: {first}; --debug shows where"
    return _complain(line, UNEXPECTED, debug)


def _complain(line: str, code: int, debug: bool) -> int:
    with contextlib.suppress(BrokenPipeError):  # nobody reads stderr: the code has to do
        if debug:
            traceback.print_exc()
        click.echo(f"moepack: {line}", err=True)
    return code


def _resource_message(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; lower --ram or close other programs"
    from moepack_formats.osio import resource_error

    return str(resource_error(error, error.filename or "input/output"))
