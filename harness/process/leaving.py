"""Leave a training process at once, whatever its native threads are doing. Torch-free."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from harness.errors import ExitCode


def leave_after(main: Callable[[], int]) -> NoReturn:
    """Call ``main`` and end the process with the exit code that it returns, or with 3 after an exception.

    The record is written by then, and nothing that the interpreter would still do is of use: it waits for threads, and
    runs the destructors of torch's, which abort on a busy machine (a launcher takes that for a crash and kills the
    other processes) or hang in a collective that other processes have left.
    """
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            # As the interpreter would.
            with suppress(Exception):
                print(error.code, file=sys.stderr)
    except BaseException:
        with suppress(Exception):
            traceback.print_exc()
        code = int(ExitCode.RUN_FAILED)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
