"""A run that does not fit is refused before its weights are loaded."""

import numpy as np
import pytest

from experiments.config import DataConfig, ModelConfig, RunConfig
from experiments.embedded import MODELS
from experiments.room import OVERRIDE, check_room, row_lengths, workload
from experiments.run import execute
from qlora_jax.data import Pair, Pairs
from qlora_jax.plan import find_config
from qlora_jax.plan.compiled import CACHE_VARIABLE
from qlora_jax.plan.memory import _for_target
from qlora_jax.plan.workload import training_step
from qlora_jax.train import TrainConfig


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


class _Traced(Exception):
    """Enough seen."""


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"stream_weights": True, "remat": "offload"}, {}),
        pytest.param(
            {"param_dtype": "float32", "loss_chunk": None, "remat": "dots"},
            {"packing": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_planned_is_what_runs(model, data, tiny_model, tmp_path, monkeypatch):
    seen = []

    def keep(step, *args):
        seen.append((step, args))
        raise _Traced

    planned = []
    monkeypatch.setattr("experiments.run.check_room", lambda *args: planned.append(args))
    monkeypatch.setattr("qlora_jax.train.run.host_traffic", keep)
    run = RunConfig(
        model=ModelConfig(source=str(tiny_model), **model),
        data=DataConfig(max_rows=24, validation_rows=4, group_by_length=False, **data),
        train=TrainConfig(
            steps=2,
            micro_batch_size=2,
            gradient_accumulation_steps=2,
            gradients_on_host=True,
            page_min_size=64,
            optim="lion",
        ),
    )
    with pytest.raises(_Traced):
        execute(run, tmp_path / "run", labels={})
    ((step, args),), ((_, folder, sequence, target),) = seen, planned
    assert folder == tiny_model
    # The first batch need not hold the longest row: what is planned is that of its length.
    assert args[2].input_ids.shape[-1] <= sequence
    found = workload(run, find_config(folder), args[2].input_ids.shape[-1], target)
    work, _ = _for_target(found, None)
    theirs = training_step(work, present=True).program
    assert str(theirs.fn.trace(*theirs.args).jaxpr) == str(step.trace(*args).jaxpr)


def test_the_longest_rows_are_those_of_the_batches():
    pairs = Pairs([Pair(np.zeros(70, np.int32), np.zeros(33, np.int32))])
    assert row_lengths(DataConfig(), pairs) == (72, 40)
    assert row_lengths(DataConfig(buckets=(128, 256)), pairs) == (256, 40)
