"""`optbench COMMAND …`: run a command of `harness.commands` and turn its errors into one line and an exit code.

Nothing but the standard library is imported until a command is chosen. Exit codes: 0 done · 1 the check failed ·
2 bad input · 3 the run failed or diverged · 75 interrupted, run the command again to resume.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

from harness import command_help
from harness.commands import COMMANDS, Command, load
from harness.errors import ExitCode, InputError, closest

_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)
_NOT_WRITTEN += (errno.EIO, errno.ENOTDIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after `optbench`; None: those of this process.

    Returns:
        The exit code. Bad input leaves one line on standard error, last and alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or a name that is not UTF-8 must not end a command with a UnicodeEncodeError.
            stream.reconfigure(errors="backslashreplace")
    argv = _command_first(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(argv)
        # Here, because the interpreter would report a full disk at exit with a code of its own.
        _flush_stdout()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return int(ExitCode.KEYBOARD_INTERRUPT)
    except BrokenPipeError:
        # The reader of the pipe has left: that is not an error, and the exit must not write to it again.
        _discard_stdout()
        return int(ExitCode.DONE)
    except Exception as error:
        return _failure(error, is_json="--json" in argv)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _print(command_help.overview())
    if argv[0] in ("-V", "--version"):
        return _print(f"optbench {_version()}")
    name, *arguments = argv
    _refuse_nul(argv)
    command = COMMANDS.get(name)
    if command is None:
        raise _unknown_command(name, arguments)
    if "-h" in arguments or "--help" in arguments:
        return _print(command_help.command_help(name))
    return _run(command, arguments)


def _run(command: Command, argv: list[str]) -> int:
    return int(load(command.target)(argv) or 0)


def _refuse_nul(argv: Sequence[str]) -> None:
    """Refuse a NUL, which a program that calls `main` can pass; no file has one in its name."""
    for argument in argv:
        if "\0" in argument:
            raise InputError(
                "command line", ascii(argument)[:80], "holds a NUL character", fix="leave it out"
            )


def _command_first(argv: Sequence[str]) -> list[str]:
    """Move the command before ``--help`` and ``--json``: `optbench --json list`, `optbench help train`."""
    place = next((i for i, argument in enumerate(argv) if argument in COMMANDS), 0)
    before = argv[:place]
    if any(argument not in ("-h", "--help", "help", "--json") for argument in before):
        return list(argv)
    flags = ["--help" if argument == "help" else argument for argument in before]
    return [*argv[place : place + 1], *flags, *argv[place + 1 :]]


def _failure(error: Exception, *, is_json: bool) -> int:
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        # A promised file that could not be written: a full disk needs a line, not a traceback.
        name = error.filename or "standard output or a file"
        message = f"{name} can't be written: {error.strerror}"
        _report("disk", str(error.filename), message, is_json=is_json)
        return int(ExitCode.RUN_FAILED)
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        error = InputError(
            "path", str(error.filename)[:80], f"can't be used ({error.strerror})", fix="a shorter path"
        )
    if isinstance(error, UnicodeEncodeError):
        error = InputError("text", ascii(error.object)[:80], "is not UTF-8", fix="type it as UTF-8 text")
    if not isinstance(error, InputError):
        import traceback

        traceback.print_exception(error)
        return int(ExitCode.RUN_FAILED)
    _report(error.key, str(error.value), str(error), is_json=is_json)
    return int(ExitCode.BAD_INPUT)


def _report(key: str, value: str, message: str, *, is_json: bool) -> None:
    """Print an error as the last line on standard error, and with ``--json`` as the document on standard output."""
    from harness.output import json_document
    from harness.visible import visible

    try:
        if is_json:
            print(json_document(error={"key": key, "value": value, "message": message}))
        _flush_stdout()
    except OSError:
        _discard_stdout()
    print(visible(message), file=sys.stderr)


def _flush_stdout() -> None:
    # None where the command was started with a closed standard output (``>&-``).
    if sys.stdout is not None:
        sys.stdout.flush()


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unknown_command(name: str, arguments: list[str]) -> Exception:
    typed = " ".join(arguments)
    if "=" in name:
        return InputError(
            "command",
            name,
            "is not a command",
            allowed=COMMANDS,
            suggestion=f"train {name}",
            fix=f"optbench train {name} {typed}",
        )
    guess = closest(name, COMMANDS)
    fix = f"optbench {guess} {typed}" if guess else "optbench --help"
    return InputError("command", name, "is not a command", allowed=COMMANDS, suggestion=guess, fix=fix)


def _print(text: str) -> int:
    print(text)
    return 0


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("optbench")
    except PackageNotFoundError:
        return "(not installed: running from a checkout)"


if __name__ == "__main__":
    sys.exit(main())
