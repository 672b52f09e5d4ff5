"""Where the reference results and the real data lie, beside the repository (never in it)."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(relative: str) -> Path:
    """The path of a shared file or folder; skips the calling test or module where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is absent: it lies beside the repository", allow_module_level=True)
    return path
