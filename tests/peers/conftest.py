"""Real transformers, PEFT and bitsandbytes: what `make test-peers` installs."""

from pathlib import Path

import pytest

from tests.shared import shared_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The peers warn of their own affairs; elsewhere a warning is an error."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def vectors():
    """The folder of a tiny random model, by name."""
    return lambda name: shared_path(f"vectors/models/{name}")
