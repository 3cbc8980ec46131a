"""Fixtures of several files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """What an audit reads, by the names of `tests.auditing`."""
    from tests.auditing import write_files

    return write_files(tmp_path)


@pytest.fixture
def adapter(files: dict[str, Path], tmp_path: Path) -> Path:
    """Fitted to pairs beside those files, query side."""
    from tests.auditing import write_adapter

    return write_adapter(files, tmp_path)
