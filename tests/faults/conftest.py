from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.running import write_documents


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))
