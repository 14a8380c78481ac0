"""What every command shares at the terminal: results, progress, errors and exit codes.

Results go to stdout, progress and notes to stderr. Errors are one line each, with the exit code of
`audit.errors`; `--debug`, anywhere on the command line, lets them through with their traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.segment import Segment

from audit.errors import LayermendError

__all__ = [
    "Progress",
    "be_quiet",
    "error_line",
    "print_json",
    "printable",
    "progress",
    "run_app",
    "say",
    "stdout",
]

_PIPE_WIDTH = 120
_LINES_EVERY_S = 1.0
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_LONGEST = 1500
_REMEDIES = {
    errno.ENOSPC: "free some space and run again; what was finished before is whole",
    errno.EDQUOT: "free some space and run again; what was finished before is whole",
    errno.EACCES: "check the permissions, or write to another folder with --out",
    errno.EPERM: "check the permissions, or write to another folder with --out",
    errno.EROFS: "write to another folder with --out",
}


def printable(text: str) -> str:
    """Return the text with what a terminal would obey written out: `\\x1b`, not an escape.

    Line breaks stay. What remains can be encoded whatever the text held.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class _Inert(RenderHook):
    """Makes whatever is printed harmless: names in it come from files that others wrote."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(one) for one in renderables]


@dataclass(frozen=True)
class _Printable:
    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        for text, style, control in console.render(self.content, options):
            yield Segment(text if control else printable(text), style, control)


stdout = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
_stderr = Console(stderr=True, highlight=False)
for _console in (stdout, _stderr):
    _console.push_render_hook(_Inert())


def run_app(app: typer.Typer) -> None:
    """Run a command line to its end and exit the process with the code that `audit.errors` names.

    Wrong usage exits with 2, an interrupt with 130, any error that is not ours with 1.
    """
    arguments, debug = _without_debug(sys.argv[1:])
    command = typer.main.get_command(app)
    command.epilog = command.epilog or "Add --debug to any command for the traceback of an error."
    try:
        code = command.main(args=arguments, prog_name=_program_name(), standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        sys.exit(_report(error))
    if code == _INTERRUPTED:
        say("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def be_quiet() -> None:
    """Say nothing from here on: one process of several talks, and it is not this one."""
    stdout.quiet = _stderr.quiet = True


def say(text: str) -> None:
    """Write one line to stderr, never wrapped, so that it can be searched for."""
    _stderr.print(text, markup=False, soft_wrap=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout, as `--json` promises."""
    from audit.files import json_text

    if not stdout.quiet:
        sys.stdout.write(json_text(document) + "\n")  # has nothing in it that a terminal obeys


@dataclass(frozen=True)
class Progress:
    """A step under way; `advance` counts what is done."""

    advance_by: Callable[[int], None]

    def advance(self, n: int = 1) -> None:
        self.advance_by(n)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Progress]:
    """Show a long step on stderr with a bar, a count and the time left.

    Where stderr is no terminal there is one plain line at the start and one at the end; in between
    one a second if `LAYERMEND_PROGRESS=lines` asks for them, for a program that reads along.
    Without a total there is no time left to tell, only what is done.
    """
    if _stderr.is_terminal:
        yield from _live_bar(description, total)
    else:
        yield from _plain_lines(description, total)


def _live_bar(description: str, total: int | None) -> Iterator[Progress]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=_stderr) as live:
        task = live.add_task(description, total=total)
        yield Progress(lambda n: live.advance(task, n))


def _plain_lines(description: str, total: int | None) -> Iterator[Progress]:
    done = 0
    started_s = said_s = time.monotonic()
    often = os.environ.get("LAYERMEND_PROGRESS") == "lines" and total is not None

    def count(n: int) -> None:
        nonlocal done, said_s
        done += n
        if often and time.monotonic() - said_s >= _LINES_EVERY_S:
            said_s = time.monotonic()
            say(f"{description}: {done} of {total}")

    say(f"{description} ..." if total is None else f"{description} (0 of {total}) ...")
    yield Progress(count)
    elapsed_s = time.monotonic() - started_s
    amount = f"{done}" if total is None else f"{done} of {total}"
    say(f"{description}: {amount} in {elapsed_s:.1f} s")


def _report(error: BaseException) -> int:
    """Print the one line that an error deserves; return the exit code."""
    if isinstance(error, LayermendError):
        say(f"error: {error_line(error)}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return _INTERRUPTED
    if isinstance(error, typer.Abort):
        say("aborted")
        return 1
    if hasattr(error, "format_message"):  # raised by Typer for the command line itself
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is the message
            say(message)
        else:
            say(f"error: {' '.join(message.split()).rstrip('.')} (see {_program_name()} --help)")
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder without permission
        say(f"error: {error_line(error)}")
        return 1
    say(f"internal error: {error_line(error)} (run again with --debug for the traceback)")
    return 1


def error_line(error: BaseException) -> str:
    """Return what is said about an error: one line without control characters, cut where long."""
    if isinstance(error, LayermendError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0)
        text = f"{error.strerror}{place}" + (f"; {remedy}" if remedy else "")
    else:
        text = f"{type(error).__name__}: {error}"
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the arguments that stand before a bare `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) < end


def _program_name() -> str:
    from pathlib import Path

    program = Path(sys.argv[0])
    return program.parent.name if program.name == "__main__.py" else program.stem
