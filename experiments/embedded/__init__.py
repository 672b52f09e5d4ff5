"""Real pretrained tiny Llamas, the corpus and the datasets they come from, small enough for git.

Everything here is made by the two scripts beside this file, from text every machine with a Python
has: `make_corpus` freezes the standard library (sources, docstrings, language reference) into a
corpus, three instruction datasets and a tokenizer; `pretrain` trains one Llama per scale on the
corpus with this project's own decoder. The sweep's default, the quickstart notebook and the tests
run on the result, with no network.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
"""The folder that holds `corpus/`, `datasets/`, `tokenizer/` and `models/`."""

MODELS: dict[str, Path] = {
    "stdlib-1m": ROOT / "models" / "stdlib-1m",
    "stdlib-4m": ROOT / "models" / "stdlib-4m",
}
"""The embedded models by name, smallest first: folders in Hugging Face's format."""


class EmbeddedDataset(NamedTuple):
    """A folder with `train.jsonl` and `validation.jsonl`, and the prompt format of its rows."""

    folder: Path
    format: str


DATASETS: dict[str, EmbeddedDataset] = {
    "describe": EmbeddedDataset(ROOT / "datasets" / "describe", "alpaca"),
    "implement": EmbeddedDataset(ROOT / "datasets" / "implement", "input-output"),
    "chat": EmbeddedDataset(ROOT / "datasets" / "chat", "messages"),
}
"""The embedded datasets by name."""
