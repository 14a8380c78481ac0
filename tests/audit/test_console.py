"""Exit codes, one line per error, and progress that stays out of stdout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = '''
import time
import typer
from audit import errors
from audit.console import progress, run_app, say, stdout

app = typer.Typer(no_args_is_help=True)

@app.command()
def work(count: int, json: bool = False):
    """Do it."""
    with progress("reading [images]", total=count) as step:
        for _ in range(count):
            step.advance()
    stdout.print("result")

@app.command()
def fail(kind: str):
    if kind == "bug":
        raise ZeroDivisionError("division\\nby zero")
    if kind == "disk":
        open("/no/such/folder/file")
    if kind == "exit":
        raise typer.Exit(3)
    raise getattr(errors, kind)("no layer 'x' in vgg16;\\n closest: [block1]")

@app.command()
def wait():
    say("waiting")
    time.sleep(30)

run_app(app)
'''


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "tool.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return [sys.executable, str(path)]


def run(program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("LayermendError", 1),
        ("NetworkError", 1),
        ("UntrustedPickleError", 1),
        ("LayerNotFoundError", 1),
        ("ImageError", 1),
        ("ClassMismatchError", 1),
        ("RunError", 1),
        ("ExportError", 1),
        ("UsageError", 2),
        ("GateTripped", 3),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(program: list[str], kind: str, code: int) -> None:
    finished = run(program, "fail", kind)
    assert finished.returncode == code
    assert finished.stderr == "error: no layer 'x' in vgg16; closest: [block1]\n"
    assert finished.stdout == ""


def test_success_is_zero_and_only_results_are_on_stdout(program: list[str]) -> None:
    finished = run(program, "work", "3")
    assert finished.returncode == 0
    assert finished.stdout == "result\n"
    start, end = finished.stderr.splitlines()
    assert start == "reading [images] (0 of 3) ..."
    assert end.startswith("reading [images]: 3 of 3 in ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["work"], "Missing argument 'count'"),
        (["work", "three"], "Invalid value for 'count'"),
        (["work", "3", "--no-such"], "No such option: --no-such"),
        (["wrok"], "No such command 'wrok'"),
    ],
)
def test_wrong_usage_is_two_and_one_line(
    program: list[str], arguments: list[str], said: str
) -> None:
    finished = run(program, *arguments)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: ")
    assert said in finished.stderr
    assert finished.stdout == ""


def test_a_bug_is_one_line_that_points_to_debug(program: list[str]) -> None:
    finished = run(program, "fail", "bug")
    assert finished.returncode == 1
    assert finished.stderr == (
        "internal error: ZeroDivisionError: division by zero "
        "(run again with --debug for the traceback)\n"
    )


def test_a_file_system_error_is_not_called_internal(program: list[str]) -> None:
    finished = run(program, "fail", "disk")
    assert finished.returncode == 1
    assert finished.stderr == "error: No such file or directory: /no/such/folder/file\n"


@pytest.mark.parametrize(
    "arguments", [["--debug", "fail", "RunError"], ["fail", "RunError", "--debug"]]
)
def test_debug_anywhere_shows_the_traceback(program: list[str], arguments: list[str]) -> None:
    finished = run(program, *arguments)
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "audit.errors.RunError" in finished.stderr


def test_a_command_may_choose_its_exit_code(program: list[str]) -> None:
    assert run(program, "fail", "exit").returncode == 3


@pytest.mark.parametrize("arguments", [["--help"], ["work", "--help"]])
def test_help_is_zero_and_on_stdout(program: list[str], arguments: list[str]) -> None:
    finished = run(program, *arguments)
    assert finished.returncode == 0
    assert "Usage: tool" in finished.stdout
    assert finished.stderr == ""


def test_no_arguments_at_all_show_the_help(program: list[str]) -> None:
    finished = run(program)
    assert finished.returncode == 2
    assert "Usage: tool" in finished.stdout + finished.stderr
    assert "error" not in finished.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_an_interrupt_is_130_and_one_line(program: list[str]) -> None:
    with subprocess.Popen(
        [*program, "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A parent that runs in the background ignores interrupts, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "waiting\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=20)
    assert child.returncode == 130
    assert said == "interrupted\n"


def test_a_reader_that_leaves_is_no_error_message(program: list[str]) -> None:
    finished = subprocess.run(
        ["bash", "-c", '"$@" | true', "bash", *program, "work", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "rror" not in finished.stderr


# -------------------------------------------------------------------- names that others chose


HOSTILE = "\x1b]0;owned\x07\x9b31m\u202egnp\ud800[red]x[/red]"


def test_nothing_that_a_terminal_obeys_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from audit import console

    table = Table("name")
    table.add_row(Text(HOSTILE))
    console.stdout.print(table)
    console.say(f"no image {HOSTILE}")
    console.print_json({HOSTILE: HOSTILE})
    written = capsys.readouterr()
    for text in (written.out, written.err):
        assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text
        assert all(c.isprintable() or c == "\n" for c in text)
        assert "[red]x[/red]" in text  # as it is called, not as markup
    assert "no image \\x1b]0;owned\\x9b31m\\u202egnp\\ud800" in written.err
    document = written.out[written.out.index("{") :]
    assert json.loads(document) == {HOSTILE: HOSTILE}
