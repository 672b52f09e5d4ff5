"""A run that does not fit is refused before its weights are loaded."""

import pytest

from experiments.config import ModelConfig, RunConfig
from experiments.embedded import MODELS
from experiments.room import OVERRIDE, check_room
from qlora_jax.plan.compiled import CACHE_VARIABLE


def test_a_run_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    name, folder = next(iter(MODELS.items()))
    run = RunConfig(model=ModelConfig(source=name))
    # Which switches help is tested with the plan; each would be one more program to compile.
    monkeypatch.setattr("qlora_jax.plan.preflight.advise", lambda *_: ())
    check_room(run, folder, 48)  # a CPU does not tell its memory
    check_room(run, folder, 48, memory=2**34)
    with pytest.raises(ValueError, match=f"too much.*{OVERRIDE}=1"):
        check_room(run, folder, 48, memory=2**20)
    monkeypatch.setenv(OVERRIDE, "1")
    check_room(run, folder, 48, memory=2**20)
