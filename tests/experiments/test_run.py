"""What of a run's options reaches its model, its loss and its batches; none is computed here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import run as runs
from experiments.checks import Checked, mesh_of
from experiments.config import build_run
from qlora_jax.data import Batches, Examples, PackedBatches, Pair, Pairs, Seq2SeqBatches


def test_every_option_of_the_model_reaches_it(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(runs, "load_pretrained", lambda folder, **options: told.update(options))
    model = {
        "compute_dtype": "float16",
        "param_dtype": "float32",
        "embedding_bits": 8,
        "remat": "offload",
        "stream_weights": True,
        "mlp_tile": 32,
        "attention": "chunked",
    }
    tree = {
        "model": {"source": "stdlib-1m", **model},
        "data": {"packing": True},
        "quant": {"quant_type": "fp4"},
        "lora": {"r": 2},
        "train": {"seed": 7},
        "devices": {"count": 2, "weights": "cut"},
    }
    run = build_run(tree, "here")
    runs._load(run, tmp_path, 96)
    assert told == {
        **model,
        "compute_dtype": jnp.float16,
        "param_dtype": jnp.float32,
        "packed": True,
        "longest": 96,
        "quant": run.quant,
        "lora": run.lora,
        "seed": 7,
        "mesh": mesh_of(run.devices),
        "over": "data",
    }
    del tree["model"]["param_dtype"], tree["devices"]["weights"]
    runs._load(build_run(tree, "here"), tmp_path, 96)
    assert (told["param_dtype"], told["over"]) == (jnp.float16, None)


def rows(kind: type) -> Examples | Pairs:
    rng = np.random.default_rng(0)
    made = [rng.integers(3, 90, n).astype(np.int32) for n in rng.integers(2, 33, 24)]
    return (
        Examples.of((ids, ids) for ids in made)
        if kind is Examples
        else Pairs(map(Pair, made, made))
    )


@pytest.mark.parametrize(
    ("kind", "packing"), [(Examples, False), (Examples, True), (Pairs, False)], ids=str
)
def test_batches_are_made_by_the_options(kind, packing, tmp_path):
    tree = {
        "data": {"packing": packing, "buckets": [32, 48], "group_by_length": True},
        "train": {"seed": 7, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    run = build_run(tree, "here")
    checked = Checked(tmp_path, rows(kind), rows(kind)[:5], 1, None)
    shared = {"batch_size": 2, "seed": 7, "pad_token_id": 1}
    training = {**shared, "accumulation": 2}
    if packing:
        expected = PackedBatches(checked.train, length=64, **training)
    elif kind is Pairs:
        options = {"source_buckets": (32, 48), "group_by_length": True}
        expected = Seq2SeqBatches(checked.train, **options, **training)
    else:
        options = {"buckets": (32, 48), "group_by_length": True}
        expected = Batches(checked.train, **options, **training)
    found = runs._training_batches(run, checked, 64)
    for step in range(3):
        jax.tree.map(np.testing.assert_array_equal, found.at(step), expected.at(step))
    # What a run is held against comes row by row, in the order given.
    held_out = runs._batches(run, checked, checked.validation, shuffle=False)
    read = np.concatenate([batch.input_ids for batch in held_out.one_epoch()])
    for row, (ids, _) in zip(read, checked.validation, strict=False):
        np.testing.assert_array_equal(row[: len(ids)], ids)
