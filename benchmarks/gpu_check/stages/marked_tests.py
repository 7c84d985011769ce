"""Stage 2: the tests with the marker ``gpu``."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runner import ROOT

_QUICK = "tests/gpu/test_linalg.py"
_MOST_FAILURES = 10


def run(context: StageContext) -> None:
    """Run the tests and report their counts and the first failures."""
    proves = "All tests with the marker gpu pass on this device."
    report = context.folder / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu and not slow",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={report}",
    ]
    command += [_QUICK] if context.quick else marked_files()
    # The stage's own process has CUDA's context, too: the tests must have the device's memory for themselves.
    environment = {**os.environ, "OPTBENCH_TEST_DEVICE": context.device.type}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not report.is_file():
        reason = " | ".join((ended.stdout + ended.stderr).strip().splitlines()[-3:])
        context.check("pytest -m gpu", proves, False, {"exit_code": ended.returncode}, reason[-400:])
        return
    suite = ET.parse(report).getroot()
    cases = list(suite.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    figures = {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "seconds": sum(float(case.get("time", 0)) for case in cases),
    }
    names = ", ".join(str(case.get("name")) for case in failed[:_MOST_FAILURES])
    context.check("pytest -m gpu", proves, ended.returncode == 0 and not failed, figures, names)
    rows = [[case.get("classname", ""), case.get("name", ""), _reason(case)] for case in [*failed, *skipped]]
    if rows:
        context.table("Failed and skipped tests", ["file", "test", "reason"], rows)


def marked_files() -> list[str]:
    """Return the files with tests that need a GPU: collecting all others would take half a minute."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    own = [path for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")) if path not in files]
    return [str(path.relative_to(ROOT)) for path in [*own, *files]]


def _reason(case: ET.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return f"{kind}: {found.get('message', '')}"[:300]
    return ""
