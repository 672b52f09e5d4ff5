"""Runs that end when the held-out loss falls no more, and that keep the adapter of the lowest.

What a toy loses on held-out rows is given here, evaluation by evaluation.
"""

import dataclasses
import io
import math

import numpy as np
import pytest
from rich.console import Console

from qlora_jax.evaluate import Evaluation
from qlora_jax.train import Callback, Checkpoints, TrainConfig, fit
from qlora_jax.train.best import Best
from qlora_jax.train.callbacks import read_lines
from tests.train.toy import Toy, ToyBatches, adapters, toy_loss

CONFIG = TrainConfig(
    steps=12,
    micro_batch_size=4,
    save_every=100,
    eval_every=2,
    patience=2,
    keep_best=True,
    learning_rate=3e-2,
)
# Of steps 0, 2, 4, …; the base's own, before the first step, is never the best.
LOSSES = (1.0, 3.0, 2.0, 2.5, 2.0, 1.5, 1.8)


class _Kept(dict):
    """Where adapters were written, and what they were."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def save(self, folder, model):
        self[folder.relative_to(self.run).as_posix()] = adapters(model)


def _fit(folder, monkeypatch, losses=LOSSES, config=CONFIG, kept=None, **options):
    given = iter(losses)
    monkeypatch.setattr(
        "qlora_jax.train.run.evaluate",
        lambda *_: Evaluation(loss := next(given), math.exp(loss), 1),
    )
    output = io.StringIO()
    result = fit(
        Toy(),
        ToyBatches(4),
        config,
        run_folder=folder,
        loss_fn=toy_loss,
        eval_batches=[ToyBatches(4).at(1000)],
        save_adapter=(_Kept(folder) if kept is None else kept).save,
        console=Console(file=output, width=200),
        **options,
    )
    return result, output.getvalue()


def _adapters_after(steps, folder, monkeypatch):
    """Those of a run without an end of its own."""
    config = dataclasses.replace(CONFIG, steps=steps, patience=0)
    kept = _Kept(folder)
    _fit(folder, monkeypatch, [1.0] * 8, config, kept)
    return kept["adapter"]


def test_a_run_ends_when_it_is_out_of_patience_and_keeps_the_best(tmp_path, monkeypatch):
    kept = _Kept(tmp_path)
    result, told = _fit(tmp_path, monkeypatch, kept=kept)
    # That of step 8 is as low as the lowest, not lower.
    assert result.best == Best(2.0, 4, 2)
    assert (result.step, result.last_eval.loss) == (8, 2.0)
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 8
    assert "the run ends at step 8: the held-out loss was lowest at step 4, and 2 evalu" in told
    assert "8 steps, held-out loss 1.0000 → 2.0000, lowest 2.0000 at step 4" in told
    assert list(kept) == ["best", "adapter"]
    for folder, steps in (("best", 4), ("adapter", 8)):
        expected = _adapters_after(steps, tmp_path / str(steps), monkeypatch)
        for found, leaf in zip(kept[folder], expected, strict=True):
            np.testing.assert_array_equal(found, leaf)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest_step() == 8


def test_one_that_ended_goes_on_with_more_patience_alone(tmp_path, monkeypatch):
    _fit(tmp_path, monkeypatch)
    again, _ = _fit(tmp_path, monkeypatch, [2.0])
    assert (again.step, again.best) == (8, Best(2.0, 4, 2))
    kept = _Kept(tmp_path)
    patient = dataclasses.replace(CONFIG, patience=3)
    further, _ = _fit(tmp_path, monkeypatch, LOSSES[5:], patient, kept)
    assert (further.step, further.best) == (12, Best(1.5, 10, 1))
    assert list(kept) == ["best", "adapter"]


class _Killed(Callback):
    def log(self, step, values):
        if step == 7:
            raise RuntimeError("killed")


def test_a_killed_run_knows_its_best(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, save_every=6)
    with pytest.raises(RuntimeError, match="killed"):
        _fit(tmp_path, monkeypatch, config=config, callbacks=[_Killed()])
    kept = _Kept(tmp_path)
    result, _ = _fit(tmp_path, monkeypatch, LOSSES[4:], config, kept)
    assert (result.step, result.best) == (8, Best(2.0, 4, 2))
    assert list(kept) == ["adapter"]


def test_what_was_evaluated_after_the_checkpoint_is_found_again():
    lines = [{"step": i, "eval_loss": loss} for i, loss in enumerate((0.5, 3.0, 2.0, 1.0))]
    assert Best.of([*lines, {"step": 2, "loss": 0.1}], upto=2) == Best(2.0, 2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patience": -1}, "patience=-1 must be 0 or more"),
        ({"eval_every": 0, "keep_best": False}, "patience=2 goes by evaluations .* set eval_every"),
        ({"eval_every": 0, "patience": 0}, "keep_best=True goes by evaluations"),
    ],
)
def test_options_that_go_by_no_evaluation_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (CONFIG, {}, "patience=2 goes by held-out loss: give eval_batches"),
        (dataclasses.replace(CONFIG, patience=0), {}, "keep_best=True goes by held-out loss"),
        (CONFIG, {"eval_batches": []}, "keep_best=True keeps an adapter: give save_adapter"),
    ],
)
def test_a_run_without_what_they_need_is_refused(config, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(Toy(), ToyBatches(4), config, run_folder=tmp_path / "run", loss_fn=toy_loss, **given)
    assert not (tmp_path / "run").exists()
