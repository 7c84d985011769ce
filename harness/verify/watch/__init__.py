"""Is my optimizer right? Record a few updates of any training loop and compare them with the rule that it claims."""

from harness.verify.watch.findings import DEFECTS, NOTES, Finding
from harness.verify.watch.report import Report
from harness.verify.watch.session import watch

__all__ = ["DEFECTS", "NOTES", "Finding", "Report", "watch"]
