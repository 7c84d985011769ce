"""Audit the optimizer of your own training loop: ``with watch(model, optimizer) as report: …`` (docs/watch.md)."""

from harness.verify.watch import DEFECTS, NOTES, Finding, Report, watch

__all__ = ["DEFECTS", "NOTES", "Finding", "Report", "watch"]
