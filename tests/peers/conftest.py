"""Real transformers, PEFT and bitsandbytes: what `make test-peers` installs."""

from pathlib import Path

import pytest

from qlora_jax.checkpoints import save_model
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder
from tests.shared import shared_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The peers warn of their own affairs; elsewhere a warning is an error."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def vectors(tmp_path):
    """The folder of a tiny random model, by name; of `VARIANTS` it is made."""

    def folder(name: str) -> Path:
        if name not in VARIANTS:
            return shared_path(f"vectors/models/{name}")
        made = tmp_path / "made" / name
        if not made.exists():
            save_model(made, random_decoder(VARIANTS[name]))
        return made

    return folder
