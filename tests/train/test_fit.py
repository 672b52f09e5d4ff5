"""The loop around the step: what it reports, when it looks, and how it stops."""

import dataclasses
import io
import itertools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from qlora_jax.data import Pair, Pairs, Seq2SeqBatches
from qlora_jax.train import Checkpoints, Probe, TrainConfig, WandB, clock, fit
from qlora_jax.train.callbacks import MetricsFile, TensorBoard, read_lines
from qlora_jax.train.progress import ProgressDisplay
from qlora_jax.train.run import _real_tokens
from tests.train.toy import VOCABULARY, Toy, ToyBatches, adapters, toy_loss

CONFIG = TrainConfig(
    steps=12, learning_rate=3e-2, micro_batch_size=4, save_every=4, eval_every=5, log_every=5
)


def _fit(folder, *, config=CONFIG, batches=None, terminal=False, model=None, **options):
    output = io.StringIO()
    model = model or Toy()
    result = fit(
        model,
        batches or ToyBatches(4, lengths=(8, 16)),
        config,
        run_folder=folder,
        loss_fn=toy_loss,
        console=Console(file=output, force_terminal=terminal, width=120),
        **options,
    )
    return model, result, output.getvalue()


class _Silent:
    def start(self, step):
        pass

    def log(self, step, values):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def test_a_run_learns_looks_saves_and_tells(tmp_path):
    saved = []
    held_out = [ToyBatches(4).at(1000), ToyBatches(4).at(1001)]
    before = adapters(Toy())
    model, result, text = _fit(
        tmp_path / "run",
        eval_batches=held_out,
        save_adapter=lambda folder, model: saved.append((folder, adapters(model))),
    )
    assert result.step == 12
    assert result.first_eval is not None
    assert result.last_eval is not None
    assert result.last_eval.loss < result.first_eval.loss - 0.1
    assert result.last_eval.tokens == sum(int((b.labels != -100).sum()) for b in held_out)
    assert result.tokens_per_second > 0
    assert result.peak_host_bytes > 50 * 2**20
    # The model in the caller's hands is the trained one, and so is the one that was saved.
    run = tmp_path / "run"
    names = [folder.relative_to(run).as_posix() for folder, _ in saved]
    assert names == ["adapters/4", "adapters/8", "adapter"]
    for first, now, kept in zip(before, adapters(model), saved[-1][1], strict=True):
        assert np.abs(first - now).max() > 1e-3
        np.testing.assert_array_equal(now, kept)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 5, 10, 12]
    assert lines[-1]["eval_loss"] == result.last_eval.loss
    assert "step 5/12: loss" in text
    assert "step 10: held-out loss" in text
    assert "\x1b" not in text
    assert "12 steps, held-out loss" in text.splitlines()[-1]
    assert "peak host memory" in text.splitlines()[-1]
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_new_run_says_how_many_epochs_it_takes(tmp_path):
    class Small(ToyBatches):
        steps_per_epoch = 5

    told = "2 steps of 4 rows = 0.40 epochs of 5 steps"
    config = dataclasses.replace(CONFIG, steps=2)
    text = _fit(tmp_path / "run", config=config, batches=Small(4))[2]
    assert text.splitlines()[0] == told
    assert "epochs" not in _fit(tmp_path / "run", config=config, batches=Small(4))[2]


def test_host_traffic_is_told_once_and_with_every_step(tmp_path):
    config = TrainConfig(steps=2, micro_batch_size=4, page_min_size=1)
    model, result, text = _fit(tmp_path, config=config)
    # Both moments of every adapter, in float32, in and out.
    expected = 2 * sum(2 * 4 * x.size for x in adapters(model))
    assert result.host_traffic.total == result.host_traffic.paged_state.to_host * 2 == expected
    assert text.count("host traffic a step: ") == 1
    assert "paged state" in text
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["host_bytes"] for line in lines if "loss" in line] == [expected] * 2


def test_probes_see_the_model_as_it_trains(tmp_path):
    seen = []

    def examine(model, step):
        seen.append((step, adapters(model)))
        return {"mmlu_micro": step / 100, "rows": jnp.int32(step), "of_numpy": np.float32(0.5)}

    model, _, text = _fit(tmp_path, probes=[Probe(5, examine)])
    assert [step for step, _ in seen] == [5, 10, 12]
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert any((a != b).any() for a, b in zip(before, after, strict=True))
    # After the last step it is the model in the caller's hands.
    for shown, kept in zip(seen[-1][1], adapters(model), strict=True):
        np.testing.assert_array_equal(shown, kept)
    lines = read_lines(tmp_path / "metrics.jsonl")
    found = [(line["step"], line["mmlu_micro"]) for line in lines if "mmlu_micro" in line]
    assert found == [(5, 0.05), (10, 0.1), (12, 0.12)]
    assert ["loss" in line for line in lines if line["step"] == 5] == [True, False]
    told = [(line["rows"], line["of_numpy"]) for line in lines if "rows" in line]
    assert told == [(5, 0.5), (10, 0.5), (12, 0.5)]
    assert "step 10: mmlu_micro 0.1" in text


def test_an_interrupt_while_a_model_is_examined_does_not_keep_the_step(tmp_path):
    """A run that goes on from it would lack what was to be found."""

    def examine(model, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, probes=[Probe(5, examine)])
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 4


class _Epochs:
    def one_epoch(self):
        return iter([ToyBatches(4).at(1000)])


def test_a_terminal_gets_a_bar_and_evaluation_takes_epochs(tmp_path):
    _, result, text = _fit(tmp_path, terminal=True, eval_batches=_Epochs())
    assert "12/12" in text
    assert "tokens/s" in text
    assert result.last_eval is not None


class _Poisoned(ToyBatches):
    """From step 7 on, the labels carry the marker that `_poisoned_loss` turns into NaN."""

    def at(self, step):
        batch = super().at(step)
        return batch._replace(labels=np.full_like(batch.labels, -7)) if step >= 6 else batch


def _poisoned_loss(model, batch, key, /):
    total, count = toy_loss(model, batch, key)
    return jax.numpy.where((batch.labels == -7).any(), jax.numpy.nan, total), count


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    model = Toy()
    with pytest.raises(FloatingPointError, match=r"step 7: loss is nan.*checkpoint, step 4"):
        fit(
            model,
            _Poisoned(4),
            CONFIG,
            run_folder=tmp_path,
            loss_fn=_poisoned_loss,
            console=Console(file=io.StringIO()),
        )
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 7))
    assert not (tmp_path / "run.lock").exists()


def test_adapters_that_are_not_finite_are_not_saved(tmp_path):
    config = TrainConfig(steps=4, micro_batch_size=4, save_every=1)
    wild = optax.stateless_with_tree_map(lambda g, p: jnp.full_like(g, jnp.inf))
    with pytest.raises(FloatingPointError, match=r"step 1: its update made.*No checkpoint was"):
        _fit(tmp_path, config=config, tx=wild)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None


def test_a_gradient_that_is_not_finite_stops_the_run_where_its_loss_is(tmp_path):
    def loss(model, batch, key, /):
        total, count = toy_loss(model, batch, key)
        return total + jnp.sqrt(0 * total), count  # of slope 0 · ∞

    with pytest.raises(FloatingPointError, match=r"step 1: loss is \d.* the gradient norm is nan"):
        fit(
            Toy(), ToyBatches(4), CONFIG, run_folder=tmp_path, loss_fn=loss,
            console=Console(file=io.StringIO()),
        )  # fmt: skip


def test_speed_is_of_steps_alone(tmp_path, monkeypatch):
    """Not of compiling, looking, examining or saving: here on a clock that these move far."""
    now = [0.0]

    def takes(seconds, value=None):
        now[0] += seconds
        return value

    class Slow(ToyBatches):
        def at(self, step):
            batch = super().at(step)
            batch.attention_mask[:, 1:] = False
            return takes(1.0, batch)

        def one_epoch(self):
            return takes(1e3, iter([super().at(1000)]))

    class Saving(_Silent):
        def flush(self):
            takes(1e6)

    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    _, result, _ = _fit(
        tmp_path / "run",
        batches=Slow(4),
        eval_batches=Slow(4),
        probes=[Probe(3, lambda model, step: takes(1e4, {}))],
        callbacks=[Saving()],
    )
    # 4 tokens that are no padding a step of a second; what is collated ahead may fall into the one
    # before.
    assert 2 <= result.tokens_per_second <= 8
    # Two steps of two lengths, both of which compile.
    config = dataclasses.replace(CONFIG, steps=2)
    assert _fit(tmp_path / "new", config=config)[1].tokens_per_second is None


def test_batches_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \[3, 8\].*need \[1, 4, ...\]"):
        _fit(tmp_path, batches=ToyBatches(3))
    # One micro-batch where an update needs two.
    config = dataclasses.replace(CONFIG, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"shape \[4, 8\].*need \[2, 4, ...\]"):
        _fit(tmp_path, config=config, batches=ToyBatches(4))


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no nnx\.LoRAParam"):
        _fit(tmp_path, model=nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


def test_metrics_file_cuts_what_a_killed_run_left_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": n, "loss": 1.0 / n, "elapsed_seconds": 100.0 * n} for n in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    file = MetricsFile(path)
    file.start(2)
    file.log(3, {"loss": 9.0})
    file.flush()
    file.close()
    *kept, new = read_lines(path)
    assert kept == lines[:2]
    # What step 3 took before it was lost was spent all the same.
    assert 300.0 <= new.pop("elapsed_seconds") < 400.0
    assert new == {"step": 3, "loss": 9.0}


def test_what_failed_before_its_first_checkpoint_does_not_bind_the_folder(tmp_path):
    with pytest.raises(ValueError, match="leaf of shape"):
        _fit(tmp_path, batches=ToyBatches(3), identity={"data": "wrong"})
    _, result, _ = _fit(tmp_path, identity={"data": "right"})
    assert result.step == 12
    assert json.loads((tmp_path / "config.json").read_text())["run"] == {"data": "right"}


def test_wandb_gets_the_same_numbers(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    outlet = WandB("project", name="cell", config={"seed": 1})
    outlet.start(0)
    outlet.log(1, {"loss": 2.0})
    outlet.flush()
    outlet.close()
    assert calls[0]["id"] == "cell"
    assert calls[0]["config"] == {"seed": 1}
    assert calls[1:] == [(1, {"loss": 2.0}), "end"]

    def id_of(step):
        WandB("project", name="cell", id_file=tmp_path / "id").start(step)
        return calls[-1]["id"]

    # One that was begun before there was such a file goes on by its name.
    assert id_of(step=3) == "cell"
    begun = id_of(step=0)
    assert begun == id_of(step=3) != "cell"
    assert id_of(step=0) not in ("cell", begun)


def test_tensorboard_hides_what_is_computed_again(tmp_path, monkeypatch):
    opened, written = [], []
    writer = types.SimpleNamespace(add_scalar=lambda *given: written.append(given))
    fake = types.SimpleNamespace(
        SummaryWriter=lambda folder, **options: opened.append(options) or writer
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setattr(TensorBoard, "available", staticmethod(lambda: True))
    for step in (0, 7):
        outlet = TensorBoard(tmp_path)
        outlet.start(step)
    # What failed before its first checkpoint may have been another run.
    assert opened == [{"purge_step": 0}, {"purge_step": 8}]
    outlet.log(8, {"loss": 2.0, "eval_loss": 1.5})
    assert written == [("train/loss", 2.0, 8), ("eval/loss", 1.5, 8)]


@pytest.mark.parametrize(
    ("name", "wrong"), [("input_ids", 24), ("input_ids", -100), ("labels", 24), ("labels", -1)]
)
def test_tokens_that_the_model_has_no_row_for_are_refused(name, wrong, tmp_path):
    class Wrong(ToyBatches):
        def at(self, step):
            batch = super().at(step)
            getattr(batch, name)[2, 3] = wrong if step == 1 else -100 if name == "labels" else 0
            return batch

    model = Toy()
    model.config = types.SimpleNamespace(vocab_size=VOCABULARY)
    message = f"step 2 reads {name} with {wrong}, but the model knows the 24 tokens from 0 on"
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path, model=model, batches=Wrong(4))
    assert all(np.isfinite(array).all() for array in adapters(model))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [3]}, r"batches is given a list, but needs Batches, or what has .at\(step\)"),
        ({"config": {"steps": 3}}, "config is given a dict, but needs a TrainConfig"),
        ({"eval_batches": ToyBatches(4)}, "eval_batches is given a ToyBatches, but needs Batches"),
        ({"eval_batches": Pairs()}, "eval_batches is given a Pairs, but needs Batches, or a list"),
        ({"callbacks": [print]}, "callbacks is given a builtin_function_or_method, but needs Call"),
        ({"probes": [_Silent()]}, "probes is given a _Silent, but needs Probes"),
    ],
)
def test_other_kinds_of_arguments_are_refused_before_anything_is_written(
    options, message, tmp_path
):
    with pytest.raises(TypeError, match=message):
        _fit(tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoders_speed_counts_targets_too():
    pairs = [Pair(np.arange(5), np.arange(50)), Pair(np.arange(4), np.arange(30))]
    assert _real_tokens(Seq2SeqBatches(pairs, batch_size=2).at(0)) == 5 + 50 + 4 + 30
    assert _real_tokens(ToyBatches(4).at(0)) == 4 * 8


def test_tensorboard_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoard, "available", staticmethod(lambda: False))
    with pytest.raises(ModuleNotFoundError, match=r"qlora-jax\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_plain_lines_say_where_a_run_resumed_begins_and_ends():
    output = io.StringIO()
    display = ProgressDisplay(20, console=Console(file=output), log_every=10)
    display.start(7)
    display.log(10, {"loss": 1.5, "tokens_per_second": 1234.5, "seconds_per_step": 6.1})
    display.close()
    assert output.getvalue().splitlines() == [
        "resumed after step 7 of 20",
        "step 10/20: loss 1.5000 · 1,234 tokens/s · 61 s left",
    ]
    display = ProgressDisplay(15, console=Console(file=output), log_every=10)
    for step in range(1, 16):
        display.log(step, {"loss": 1.0})
    told = [line.split(":")[0] for line in output.getvalue().splitlines()[2:]]
    assert told == ["step 1/15", "step 10/15", "step 15/15"]
    bar = ProgressDisplay(20, console=Console(file=output, force_terminal=True), log_every=10)
    bar.start(7)
    assert bar._bar.tasks[0].completed == 7
    bar.close()
