"""The process of one stage: ``python -m benchmarks.gpu_check.worker TARGET RECORD SCRATCH --device D``."""

from __future__ import annotations

import argparse
import faulthandler
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_check.record import StageContext, StageRecord
from harness.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Run the stage and complete its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("record", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    # Where it crashed, or hung when the watcher aborts it, is written to the log.
    faulthandler.enable()
    record = StageRecord.load(arguments.record)
    if record is None:
        raise InputError("gpu_check", arguments.record, "is not the record of a stage")
    context = StageContext(record, arguments.record, arguments.device, arguments.quick, arguments.scratch)
    module, function = arguments.target.split(":")
    getattr(import_module(module), function)(context)
    record.status = "done"
    record.save(arguments.record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
