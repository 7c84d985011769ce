"""A W&B server on 127.0.0.1 that this process and its children are logged in to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.analysis.dashboards.server import Server

KEY = "deadbeef" * 5


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    import wandb

    # W&B's client reads the environment once.
    wandb.teardown()
    with Server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
        monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
        monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
        monkeypatch.delenv("WANDB_MODE")
        yield running
        wandb.teardown()
        assert running.unknown == [], "the server was asked what it does not know"
