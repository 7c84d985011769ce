"""Fixtures of the tests of optimizers."""

from __future__ import annotations

import pytest

from optimizers import skipping


@pytest.fixture
def blind_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: the host may not look at gradients and flags, and learns of them one step later."""
    monkeypatch.setattr(skipping, "host_may_look", lambda device: False)
