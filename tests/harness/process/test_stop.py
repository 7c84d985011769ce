"""What a process does with the signals that ask it to end."""

import signal
import subprocess
import sys

import pytest

from harness.process.stop import KILLED

PROGRAM = """
import os, signal, sys
from harness.process import stop as stopping
stopping.REPEAT_S = 0.0
stop = stopping.Stop()
stop.install()
for _ in range(3):
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
print(stop.reason)
"""


def after_three(name: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, timeout=60)


def test_usr1_may_come_until_it_must_have_been_heard() -> None:
    ended = after_three("SIGUSR1")
    assert (ended.returncode, ended.stdout) == (0, "SIGUSR1\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_control_a_second_term_or_int_ends_at_once(name: str) -> None:
    ended = after_three(name)
    assert (ended.returncode, ended.stdout) == (KILLED + signal.Signals[name], "")
