"""Stages that end badly, for the tests of the runner."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.gpu_check.record import StageContext


def good(context: StageContext) -> None:
    context.check("first", "It works.", True, {"ms": 1.23456, "name": "a|b", "bad": float("nan")})
    context.table("Times", ["size", "ms"], [[1, 2.5], [2, None]])


def failing(context: StageContext) -> None:
    context.check("first", "It works.", False, {"error": 3.0}, "too large")
    with context.attempt("second", "It does not raise."):
        raise ValueError("one\ntwo")
    context.check_on_cuda("third", "It is fast.", False)


def crashing(context: StageContext) -> None:
    context.check("before", "It works.", True)
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def raising(context: StageContext) -> None:
    context.check("before", "It works.", True)
    raise RuntimeError("outside of an attempt")


def hanging(context: StageContext) -> None:
    context.check("before", "It works.", True)
    time.sleep(600)
