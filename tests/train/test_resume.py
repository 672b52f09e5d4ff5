"""A run killed at any step and resumed ends with the same bits as one that was left alone."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from qlora_jax.optim import paged
from qlora_jax.train import Checkpoints, TrainConfig, fit, init_state, make_train_step
from qlora_jax.train.callbacks import read_lines
from qlora_jax.train.run_folder import adapters_by_step, forget_adapters
from tests.train.toy import Toy, ToyBatches, adapters, toy_loss
from tests.train.worker import CONFIG, train


def _numbers(folder: Path) -> list[dict]:
    timing = ("tokens_per_second", "seconds_per_step", "elapsed_seconds")
    return [
        {name: value for name, value in line.items() if name not in timing}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def test_killed_runs_end_bit_identical(tmp_path):
    held_out = {"eval_batches": [ToyBatches(4).at(1000)]}
    undisturbed, _ = train(tmp_path / "undisturbed", **held_out)
    folder = tmp_path / "killed"
    # Before any checkpoint; while the save of step 5 may still be written; just before a save.
    for where, step, resumed in (("log", 3, 0), ("log", 6, (0, 5)), ("flush", 15, (0, 5, 10))):
        done = subprocess.run(
            [sys.executable, "-m", "tests.train.worker", str(folder), where, str(step)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        started = int(done.stdout.split("started after step ")[1].split()[0])
        assert started in np.atleast_1d(resumed)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')
    resumed, result = train(folder, **held_out)
    assert result.step == CONFIG.steps
    for a, b in zip(adapters(resumed), adapters(undisturbed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _numbers(folder) == _numbers(tmp_path / "undisturbed")
    assert [line["step"] for line in _numbers(folder)] == [0, *range(1, CONFIG.steps + 1), 16]


@pytest.mark.parametrize("broken_at", [5, 11])
def test_a_run_broken_off_by_an_error_resumes_bit_identical(tmp_path, broken_at, reference):
    class Broken(ToyBatches):
        def at(self, step):
            if step == broken_at:
                raise OSError("the disk is gone")
            return super().at(step)

    def run(batches):
        model = Toy(dropout=0.1)
        fit(
            model,
            batches,
            CONFIG,
            run_folder=tmp_path / "run",
            loss_fn=toy_loss,
            save_adapter=save,
        )
        return model

    def save(folder, model):
        folder.mkdir(parents=True)
        np.savez(folder / "numbers.npz", *adapters(model))

    with pytest.raises(OSError, match="disk"):
        run(Broken(2, 4))
    kept = adapters_by_step(tmp_path / "run")
    assert list(kept) == [step for step in (5, 10) if step <= broken_at]
    (tmp_path / "run" / "adapters" / ".DS_Store").touch()  # as a file manager does
    last = max(kept)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as checkpoints:
        saved = checkpoints._manager.restore(last, args=ocp.args.StandardRestore())
    in_it = [array for name, array in saved.items() if name.startswith("lora.")]
    with np.load(kept[last] / "numbers.npz") as file:
        for a, b in zip(file.values(), in_it, strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(adapters(run(ToyBatches(2, 4))), reference, strict=True):
        np.testing.assert_array_equal(a, b)
    assert list(adapters_by_step(tmp_path / "run")) == [10, 15]
    assert (tmp_path / "run" / "adapter").is_dir()
    forget_adapters(tmp_path / "run", keep=1)  # as the next checkpoint does
    assert list(adapters_by_step(tmp_path / "run")) == [15]
    assert not (tmp_path / "run" / "adapter").exists()


class _Interrupts(ToyBatches):
    """Ctrl-C, once: while a batch is made, while a step's numbers are awaited, or as soon as they,
    or an evaluation's, are logged."""

    def __init__(self, where: str, step: int) -> None:
        super().__init__(2, 4)
        self.where, self.step = where, step

    def now(self, where: str, step: int) -> None:
        if (where, step) == (self.where, self.step):
            self.where = "over"
            raise KeyboardInterrupt

    def at(self, step):
        self.now("batch", step + 1)
        return super().at(step)

    def start(self, step):
        pass

    def log(self, step, values):
        self.now("eval" if "eval_loss" in values else "log", step)

    def flush(self):
        pass

    close = flush


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """A run with evaluations: its configuration, what it is evaluated on, how it ends."""
    config, folder = dataclasses.replace(CONFIG, eval_every=6), tmp_path_factory.mktemp("examined")
    held_out = {"eval_batches": [ToyBatches(4).at(1000)]}
    return config, held_out, adapters(train(folder, config=config, **held_out)[0]), _numbers(folder)


@pytest.mark.parametrize(
    ("where", "step", "kept"),
    [
        ("batch", 1, None),
        ("wait", 8, 9),  # step 9 is on its way by then
        ("log", 8, 9),
        ("eval", 12, 10),  # the step's evaluation would be missing
        ("batch", 13, 12),  # it is there
    ],
)
def test_an_interrupt_keeps_the_step_and_ends_bit_identical(
    tmp_path, monkeypatch, examined, where, step, kept
):
    config, held_out, whole, numbers = examined
    batches = _Interrupts(where, step)

    def run():
        model, options = Toy(dropout=0.1), {"loss_fn": toy_loss, "callbacks": [batches]}
        fit(model, batches, config, run_folder=tmp_path, **options, **held_out)
        return model

    read = jax.device_get

    def wait(metrics):
        if hasattr(metrics, "grad_norm"):
            waits.append(metrics)
            batches.now("wait", len(waits))
        return read(metrics)

    waits = []
    monkeypatch.setattr(jax, "device_get", wait)
    with pytest.raises(KeyboardInterrupt):
        run()
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest_step() == kept
    for a, b in zip(adapters(run()), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    assert _numbers(tmp_path) == numbers


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return adapters(train(tmp_path_factory.mktemp("reference") / "run")[0])


def test_a_finished_run_is_not_trained_again(tmp_path, reference):
    held_out = {"eval_batches": [ToyBatches(4).at(1000)]}
    _, first = train(tmp_path, **held_out)
    before = (tmp_path / "metrics.jsonl").read_text()
    model, result = train(tmp_path, **held_out)
    assert result.train_loss is None
    assert result.last_eval == first.last_eval
    # What was before the first update only the call tells that made it.
    assert first.first_eval is not None
    assert result.first_eval is None
    assert (tmp_path / "metrics.jsonl").read_text() == before
    for a, b in zip(adapters(model), reference, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_with_more_steps_goes_on_to_the_same_bits(tmp_path):
    held_out = {"eval_batches": [ToyBatches(4).at(1000)]}

    def run(folder, steps):
        config = dataclasses.replace(CONFIG, schedule="constant", steps=steps)
        return train(tmp_path / folder, config=config, **held_out)

    whole, _ = run("whole", 9)
    run("longer", 6)
    model, result = run("longer", 9)
    assert result.step == 9
    for a, b in zip(adapters(model), adapters(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = _numbers(tmp_path / "longer")
    # What was looked at when it ended stays on record.
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 9]
    rest = [line for line in lines if line["step"] != 6 or "loss" in line]
    assert rest == _numbers(tmp_path / "whole")


@pytest.mark.optimized
def test_state_and_gradients_may_rest_elsewhere_on_resuming(tmp_path):
    """What an out-of-memory asks for, and what more room allows: to the same bits."""
    plain = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0)

    def run(folder, steps, **where):
        config = dataclasses.replace(plain, steps=steps, **where)
        return adapters(train(tmp_path / folder, config=config)[0])

    whole = run("whole", 4)
    run("moved", 2)
    run("moved", 3, paged=False, gradients_on_host=True, page_min_size=100)
    for a, b in zip(run("moved", 4), whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_configuration_is_refused_naming_the_fields(tmp_path):
    def run(config, **identity):
        model = Toy(dropout=0.1)
        fit(
            model,
            ToyBatches(2, 4),
            config,
            run_folder=tmp_path,
            loss_fn=toy_loss,
            identity={"model": {"name": "toy"}, **identity},
        )

    short = dataclasses.replace(CONFIG, steps=3)
    run(short, data="a")
    before = (tmp_path / "config.json").read_text()
    other = dataclasses.replace(short, learning_rate=0.5, seed=9, save_every=1)
    with pytest.raises(ValueError, match=r"learning_rate \(was 0.01, is 0.5\).*seed") as caught:
        run(other, data="b")
    assert "data (was 'a', is 'b')" in str(caught.value)
    assert "save_every" not in str(caught.value)
    assert (tmp_path / "config.json").read_text() == before
    run(dataclasses.replace(short, save_every=1, log_every=2), data="a")
    assert set(json.loads(before)) == {"train", "run", "found", "versions"}


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    state, _, _ = _state(10**9)
    ended = []
    checkpoints = Checkpoints(tmp_path, keep=1)
    close = checkpoints._manager.close

    def full(*arguments, **options):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "lora" at local file "x": Failed to write 5 bytes '
            "to file 9: No space left on device [os_error_code='28']"
        )

    for name in ("save", "wait_until_finished"):
        monkeypatch.setattr(checkpoints._manager, name, full)
    monkeypatch.setattr(checkpoints._manager, "close", lambda: ended.append(True))
    with pytest.raises(OSError, match=r"the disk is full: free some room") as caught:
        checkpoints.save(state)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="the disk is full"):
        checkpoints.close()
    assert ended
    monkeypatch.undo()
    close()


def _state(min_size: int, r_seed: int = 0):
    graphdef, lora, frozen = nnx.split(Toy(seed=r_seed), nnx.LoRAParam, ...)
    tx = optax.chain(
        optax.clip_by_global_norm(0.3), paged(optax.adamw(1e-2, b2=0.999), min_size=min_size)
    )
    state = init_state(lora, tx, seed=0)
    step = make_train_step(graphdef, tx, toy_loss, state=state)
    state, _ = step(state, frozen, ToyBatches(1, 4).at(0))
    return state, step, frozen


def _same(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("saved", "restored"), [(0, 0), (0, 10**9), (10**9, 0)])
def test_round_trip_between_paged_and_unpaged_state(tmp_path, saved, restored):
    state, _, _ = _state(saved)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state)
    like, step, frozen = _state(restored, r_seed=1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore(like)
    _same(found, state)
    kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(like)]
    assert [leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)] == kinds
    assert ("pinned_host" in kinds) == (restored == 0)
    found, _ = step(found, frozen, ToyBatches(1, 4).at(1))
    assert int(found.step) == 2
    # The restored state runs the program that was compiled for the fresh one.
    assert step._cache_size() == 1


def test_saving_is_not_disturbed_by_the_next_step(tmp_path):
    state, step, frozen = _state(0)
    expected = jax.tree.map(np.array, (state.lora, state.opt_state))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state)
        for i in range(3):
            state, _ = step(state, frozen, ToyBatches(1, 4).at(i))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore(state)
    _same((found.lora, found.opt_state), expected)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    train(tmp_path)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [15, 16]


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    state, _, _ = _state(0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            checkpoints.restore(state)
        checkpoints.save(state)
    wide = state._replace(lora=jax.tree.map(lambda leaf: leaf[:2], state.lora))
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(ValueError, match=r"lora.head.lora_A \(saved float32\[4, 64\], expected"),
    ):
        checkpoints.restore(wide)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    adam, _, _ = _state(10**9)
    plain = adam._replace(opt_state=())
    for name, one, other, words in (
        ("more", adam, plain, r"opt_state\S+ \(saved \S+, expected nothing\), .* …; resume with"),
        ("less", plain, adam, r"opt_state\S+ \(saved nothing, expected \S+\), .* …; resume with"),
    ):
        with Checkpoints(tmp_path / name, keep=1) as checkpoints:
            checkpoints.save(one)
            with pytest.raises(ValueError, match=words):
                checkpoints.restore(other)


def test_default_config_pages_only_large_moments():
    assert TrainConfig().page_min_size == 100_000
