"""The command as a whole: how fast it answers, and what becomes of every error."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from trimtab import __version__
from trimtab.cli import main as program
from trimtab.cli.verb import Verb, columns, duration, emit, share, size
from trimtab.core.errors import UserError

Run = Callable[..., Any]


def child(arguments: list[str], environment: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimtab", *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, **options)


def test_help_lists_every_command_and_imports_none_of_them(source_environment: dict[str, str]) -> None:
    code = (
        "import json, sys, time; from trimtab.cli.main import main; code = main(['--help']); "
        "print(json.dumps([code, time.process_time(), list(sys.modules)]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_environment, text=True, capture_output=True, timeout=60
    )
    exit_code, seconds, modules = json.loads(done.stderr)
    assert exit_code == 0
    assert seconds < 0.5
    assert {name.split(".")[0] for name in modules} & {"torch", "rich", "numpy", "transformers", "yaml"} == set()
    assert {name for name in modules if name.startswith("trimtab.cli.")} == {"trimtab.cli.main", "trimtab.cli.verb"}
    for name in program.COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_every_listed_command_exists_and_its_help_works() -> None:
    for name in program.COMMANDS:
        result = CliRunner().invoke(program.cli, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert result.output.startswith(f"Usage: trimtab {name} ")
        assert "--json" in result.output


def test_python_m_trimtab_says_its_version(source_environment: dict[str, str]) -> None:
    done = child(["--version"], source_environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"trimtab {__version__}\n", "")


def test_without_arguments_the_help_is_shown(trimtab: Run) -> None:
    done = trimtab()
    assert (done.code, done.err) == (0, "")
    assert "Commands:" in done.out


def test_an_unknown_command_names_the_nearest(trimtab: Run) -> None:
    done = trimtab("tuen")
    assert (done.code, done.out, done.err) == (2, "", "error: no command 'tuen'\n  fix: did you mean `trimtab tune`?\n")


def test_a_wrong_option_exits_with_2_and_names_the_nearest(trimtab: Run) -> None:
    done = trimtab("models", "--fetsch")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: No such option")
    assert "--fetch" in done.err.replace("--fetsch", "")
    assert "fix: trimtab models --help" in done.err


def test_errors_are_json_where_json_was_asked_for(trimtab: Run) -> None:
    for arguments in (["tuen", "--json"], ["models", "--json", "--fetsch"], ["models", "--json", "nosuch"], ["--json"]):
        done = trimtab(*arguments)
        assert done.code == 2
        assert set(done.document) == {"error", "fix"}
        assert done.err == ""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Puts a function in the place of the command `models`."""

    def put(body: Callable[[], Any]) -> None:
        made = Verb("models", callback=body)
        monkeypatch.setattr(program.Root, "get_command", lambda self, ctx, name: made)

    return put


def test_a_user_error_is_two_lines_and_no_traceback(trimtab: Run, command: Any) -> None:
    def fail() -> None:
        raise UserError("what is wrong", fix="what to do")

    command(fail)
    done = trimtab("models")
    assert (done.code, done.out, done.err) == (2, "", "error: what is wrong\n  fix: what to do\n")
    assert trimtab("models", "--json").document == {"error": "what is wrong", "fix": "what to do"}


def test_an_unexpected_error_keeps_its_traceback_and_asks_for_a_report(trimtab: Run, command: Any) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a fault")

    command(fail)
    done = trimtab("models")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "ZeroDivisionError: a fault" in done.err
    assert "Please report it" in done.err


def test_a_full_disk_is_one_message(trimtab: Run, command: Any) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")

    command(fail)
    done = trimtab("models")
    assert done.code == 2
    assert (
        done.err
        == "error: the disk is full while writing /somewhere/file\n  fix: free some space, or write to another disk\n"
    )


def test_a_file_that_may_not_be_used_is_one_message(trimtab: Run, command: Any) -> None:
    def fail() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/file")

    command(fail)
    done = trimtab("models")
    message = "error: /somewhere/file: Permission denied\n  fix: check its permissions, or use another path\n"
    assert (done.code, done.err) == (2, message)


@pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort, EOFError])
def test_an_interrupt_is_one_line_and_130(trimtab: Run, command: Any, error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    command(fail)
    done = trimtab("models")
    assert (done.code, done.out, done.err.strip()) == (130, "", "interrupted")


def test_a_closed_pipe_is_quiet(source_environment: dict[str, str]) -> None:
    code = (
        "import sys, click; from trimtab.cli import main as m; from trimtab.cli.verb import Verb\n"
        "def body():\n    for _ in range(100000): click.echo('y' * 100)\n"
        "m.Root.get_command = lambda self, ctx, name: Verb('models', callback=body)\n"
        "sys.exit(m.main(['models']))"
    )
    done = subprocess.run(
        f'"{sys.executable}" -c "$CODE" | head -n 1', shell=True, env={**source_environment, "CODE": code},
        text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "y" * 100 + "\n"
    assert done.stderr == ""


def test_json_is_the_only_thing_on_standard_output(trimtab: Run, command: Any) -> None:
    def body() -> dict[str, Any]:
        print("a library says hello")
        click.echo("and so do we")
        return {"value": float("nan"), "path": Path("x"), "items": (1, {2})}

    command(body)
    done = trimtab("models", "--json")
    assert done.code == 0
    assert done.document == {"value": None, "path": "x", "items": [1, [2]]}
    assert done.err == "a library says hello\nand so do we\n"


def test_colours_only_in_a_terminal(trimtab: Run) -> None:
    assert "\x1b" not in trimtab("models").out


def test_words_for_numbers() -> None:
    assert [size(n) for n in (0, 999, 1000, 123456789, 5e13)] == ["0 B", "999 B", "1 kB", "123 MB", "50 TB"]
    assert size(None) == "unknown"
    assert [duration(s) for s in (0.04, 59, 61, 3599.6, 7500)] == [
        "0.0 s",
        "59.0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
    assert (share(1, 3), share(1, 10**6), share(0, 0)) == ("33.3%", "0.0001%", "0%")


def test_columns_align_whatever_their_colour() -> None:
    text = columns([(click.style("a", fg="red"), "1"), ("bbb", "22")], right=(1,))
    assert [click.unstyle(line) for line in text.splitlines()] == ["  a     1", "  bbb  22"]
    assert columns([]) == ""


def test_emit_writes_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"ü": [1.5, float("inf")]})
    assert json.loads(capsys.readouterr().out) == {"ü": [1.5, None]}
