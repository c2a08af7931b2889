"""What every subcommand shares: options, and how the outcome of a run becomes an exit code.

Exit codes: 0 success, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted, 128 + n ended by
signal n.
"""

from __future__ import annotations

import builtins
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from neuron_methods.support.errors import UserError
from neuron_methods.support.memory import free_memory, is_out_of_memory
from neuron_methods.support.text import format_bytes, one_line, printable

F = TypeVar("F", bound=Callable[..., Any])

#: What an option or argument that names a place, or a file, is turned into.
PLACE = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
#: dtypes that a model can be asked to compute in.
DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])

_DEBUG = "neuron_methods.debug"  # key in click's Context.meta, which nested contexts share

# Faults of the machine, not of the program: reported like a user's mistake, even where no file is named. What is known
# to be the fault of a file (a directory in its place, a name too long) is reported so in any case.
_MACHINE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _switch_debug_on(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_DEBUG] = True


def debug_option(command: F) -> F:
    """Give a command the flag `--debug`: show the traceback when the command fails."""
    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_switch_debug_on,
        help="Show the traceback of an error.",
    )(command)


def quiet_option(help_text: str = "No progress bars.") -> Callable[[F], F]:
    """Give a command the flag `--quiet`, `-q` for short."""
    return click.option("-q", "--quiet", is_flag=True, help=help_text)


def _hide_bars(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from neuron_methods.support.progress import without_bars

        context.with_resource(without_bars())


def no_bars_option(command: F) -> F:
    """Give a command the flag `--quiet` that keeps bars from being shown, and that it need not know of."""
    return click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_hide_bars, help="No progress bars."
    )(command)


def options(*given: Callable[[F], F]) -> Callable[[F], F]:
    """Make one decorator of several options, in the order in which `--help` is to show them."""

    def decorate(command: F) -> F:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def say(text: object, *, err: bool = False) -> None:
    """Print for a terminal, which must not obey what stands in names and files."""
    click.echo(printable(str(text)), err=err)


def places(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Let the shell complete a path, as `shell_complete` of what may be an id of the Hub, too."""
    return [CompletionItem(typed, type="file")]


class Count(click.IntRange):
    """A whole number from `least` on, and no larger than anything is counted."""

    def __init__(self, least: int = 1, most: int = 2**31 - 1) -> None:
        super().__init__(least)
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Refuse what is no number, too small or too large."""
        number = super().convert(value, param, ctx)
        if number > self.most:
            self.fail(f"{number} is more than {self.most}.", param, ctx)
        return number


class Share(click.FloatRange):
    """A number from 0 to 1; click 8.5 takes NaN for one that is in any range."""

    def __init__(self, *, above_0: bool = False) -> None:
        super().__init__(0, 1, min_open=above_0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse what is no number, or out of range."""
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


#: What every generator of random numbers takes for a seed.
SEED = Count(0, 2**32 - 1)


def is_debug(context: click.Context) -> bool:
    """Whether tracebacks are wanted: by `--debug`, or by MERGEKIT_NEURON_DEBUG=1 in the environment."""
    return bool(context.meta.get(_DEBUG)) or os.environ.get("MERGEKIT_NEURON_DEBUG", "0") not in ("", "0")


def describe_error(error: Exception) -> str:
    """The line that tells the user what went wrong, without the leading `error: `."""
    if isinstance(error, UserError):
        return one_line(error) + (f" (see: mergekit-neuron help {error.topic})" if error.topic else "")
    if isinstance(error, OSError) and error.errno is not None:
        named = isinstance(error.filename, (str, os.PathLike))
        if named or error.errno in _MACHINE_FAULTS:
            place = f"{os.fspath(error.filename)}: " if named else ""
            return f"{place}{error.strerror or os.strerror(error.errno)}"
    if "No space left on device" in str(error):  # safetensors and torch wrap it in types of their own
        return f"no space left on device ({one_line(error)})"
    if is_out_of_memory(error):
        free = free_memory()
        told = f": {format_bytes(free)} are free now" if free is not None else ""
        return f"not enough memory{told}; free some, raise the limit (ulimit -v), or take smaller models or batches"
    what = type(error).__name__
    message = one_line(error)
    return f"unexpected {what}{': ' + message if message else ''}; run again with --debug for the traceback"


@contextmanager
def reporting_errors(context: click.Context) -> Iterator[None]:
    """Turn whatever ends the block into one line on stderr and an exit code.

    click's own exceptions (wrong usage, `--help`, an explicit exit) pass through to click.
    """
    try:
        yield
    except (click.exceptions.Exit, click.Abort, click.ClickException):
        raise
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        context.exit(130)
    except BrokenPipeError:
        raise  # the reader of our output went away: click leaves quietly
    except Exception as error:
        if is_debug(context):
            import traceback

            say(_without_token(traceback.format_exc().rstrip()), err=True)
        say(f"error: {_without_token(describe_error(error))}", err=True)
        context.exit(1)


def _without_token(text: str) -> str:
    from neuron_methods.models.hub_session import without_token

    return without_token(text)


@contextmanager
def asking_nobody() -> Iterator[None]:
    """Let nothing ask on stdin inside the block, where `yes |` would answer: not whether to run a model's code."""

    def refuse(_prompt: object = "") -> str:
        raise EOFError("nobody is asked")

    original, builtins.input = builtins.input, refuse
    try:
        yield
    finally:
        builtins.input = original


def _leave(signal_number: int, _frame: FrameType | None) -> None:
    # A second signal must not interrupt the clean-up that the first one started.
    signal.signal(signal_number, signal.SIG_IGN)
    sys.exit(128 + signal_number)


@contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise SystemExit, so that `finally` blocks and exit handlers run.

    A signal that somebody already handles or ignores (`nohup`) is left alone.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
