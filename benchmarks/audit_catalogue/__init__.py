"""The catalogue of docs/audit.md: every optimizer of several packages, audited in contained processes."""
