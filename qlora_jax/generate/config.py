"""What to generate: how long, how random, and where to stop."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from qlora_jax.data.json_file import read_json_if_any
from qlora_jax.data.json_kinds import IDS, check_kinds
from qlora_jax.fields import as_tuple, check_numbers

# Logits of many thousands, divided by less (or multiplied by 1 over it), leave float32.
_COLDEST = 1e-30


@dataclass(frozen=True)
class GenerationConfig:
    """Names as in the Hugging Face library; hashable, so that it can be static under jit.

    Attributes:
        max_new_tokens: tokens after the prompt, at most.
        min_new_tokens: no end token comes before so many.
        temperature: 0 takes the most likely token each time (greedy).
        top_k: draw among the k most likely; None for all.
        top_p: draw among the most likely that together reach this probability; 1 for all.
        min_p: draw among those with at least this share of the most likely one's probability; 0 for
            all.
        repetition_penalty: above 1, makes tokens less likely that the prompt (of an encoder–decoder
            the answer alone) or the answer has already; 1 for none.
        eos_token_ids: ids, or one, of which the first ends a row; none: it runs to its length.
        stop: texts, or one, that end an answer, which is cut before the first one.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: Sequence[int] | int = ()
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """ValueError for a value that no distribution or length can have."""
        for name, kind, wanted in (("stop", str, "texts"), ("eos_token_ids", Integral, "ids")):
            object.__setattr__(self, name, as_tuple(self, name, kind, wanted))
        check_numbers(self)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be 0 to "
                f"max_new_tokens={self.max_new_tokens}."
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be a finite number, 0 (greedy) or more."
            )
        if 0 < self.temperature < _COLDEST:
            raise ValueError(
                f"temperature={self.temperature} is too near to 0, by which float32 logits cannot "
                f"be divided: give 0 (greedy), or {_COLDEST} or more."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be 1 or more, or None for no limit.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be 0 to 1.")
        if not _COLDEST <= self.repetition_penalty <= 1 / _COLDEST:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be a finite number above 0, "
                "such as 1.1; 1 is none."
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which every answer begins with.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0

    def with_eos(self, eos_token_ids: Sequence[int]) -> "GenerationConfig":
        """The same, with these ends where it has none of its own."""
        return (
            self
            if self.eos_token_ids
            else dataclasses.replace(self, eos_token_ids=tuple(eos_token_ids))
        )


PAPER_SAMPLING = GenerationConfig(max_new_tokens=512, temperature=0.7, top_p=0.9)
"""How the QLoRA paper's answers were generated: nucleus 0.9 at temperature 0.7."""


def read_eos_token_ids(folder: str | Path) -> tuple[int, ...]:
    """The tokens that a model folder's generation_config.json ends texts with, or its config.json
    where there is no such file; () where neither is there, or names any.

    A chat model often ends its turns with another token than its texts, and names both there.

    Raises:
        ValueError: the file is damaged, or names something else.
    """
    files = [Path(folder) / name for name in ("generation_config.json", "config.json")]
    file = files[0] if files[0].is_file() else files[1]
    fields = read_json_if_any(file)
    check_kinds(fields, {"eos_token_id": IDS}, file)
    ids = fields.get("eos_token_id")
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
