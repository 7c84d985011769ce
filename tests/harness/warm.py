"""`optbench` commands that start in a tenth of a second: real processes, forked from one that has imported torch.

    done = warm.run("train", *words)          # as subprocess.run, with both outputs as text
    command = warm.Command("train", *words)   # as subprocess.Popen

The server that a command starts for its training processes (`harness.jobs.fork_server`) is a fork of the command
instead of a program. All else is as a shell starts it. That programs are started right is shown with real ones by
tests/harness/jobs/test_forks.py, test_launch.py, and tests/harness/process/test_parent.py.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from tests.faults.forked import CONTEXT

LIMIT_S = 240


class Command:
    """A running `optbench` command, with what tests use of `subprocess.Popen`.

    Args:
        words: of the command line.
        env: all its variables; None: those of this process.
        cwd: its current folder; None: that of this process.
        merged: its standard error goes where its standard output goes.
    """

    def __init__(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        merged: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        self._outputs = [Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")]
        files = [self._outputs[0], self._outputs[0 if merged else 1]]
        self._process = CONTEXT.Process(
            target=_become,
            args=(
                words,
                [str(file) for file in files],
                dict(os.environ if env is None else env),
                cwd or os.getcwd(),
            ),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative: by that signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, str]:
        """Wait for the end, and return what it wrote on standard output and standard error.

        Raises:
            TimeoutError: it has not ended; it is killed.
        """
        self._process.join(timeout)
        ended = self.returncode is not None
        self.kill()
        self._process.join()
        out, err = (file.read_text() if file.exists() else "" for file in self._outputs)
        if not ended:
            raise TimeoutError(f"not ended after {timeout} s\n{out}\n{err}")
        self._folder.cleanup()
        return out, err


def run(*words: str, timeout: float = LIMIT_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``options`` of `Command`."""
    command = Command(*words, **options)
    out, err = command.communicate(timeout)
    assert command.returncode is not None
    return subprocess.CompletedProcess(["optbench", *words], command.returncode, out, err)


def _become(
    words: Sequence[str], outputs: Sequence[str], environment: Mapping[str, str], folder: str
) -> NoReturn:
    """Turn this fork into the command, and end with its exit code."""
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["optbench", *words]
    from harness import cli
    from harness.jobs import forks

    forks.subprocess = SimpleNamespace(Popen=_ForkedServer, DEVNULL=subprocess.DEVNULL)  # pyright: ignore[reportAttributeAccessIssue]
    code = 1
    try:
        code = cli.main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    # Multiprocessing leaves with `os._exit`; an interpreter would call these.
    atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _ForkedServer:
    """What `harness.jobs.forks` uses of `subprocess.Popen`, for a fork that runs the server's main function.

    Args:
        command: the last word is the server's argument.
        env: all its variables.
        pass_fds: all that stays open.
        options: of `subprocess.Popen`; a fork always gets a session of its own and no input and output.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], **options: Any
    ):
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become_server(command[-1], env, pass_fds[0])

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        return self._wait(os.WNOHANG)

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int | None:
        """Wait for its end and return its exit code."""
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def _become_server(argument: str, environment: Mapping[str, str], kept: int) -> NoReturn:
    try:
        from harness.jobs import fork_server
        from harness.process.leaving import leave_after
        from harness.process.stop import SIGNALS

        os.setsid()
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        os.closerange(3, kept)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ.update(environment)
        leave_after(lambda: fork_server.main([argument]))
    finally:
        os._exit(3)
