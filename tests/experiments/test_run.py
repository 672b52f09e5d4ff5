"""What of a run's options reaches its model, its batches and its examinations, and what its result
is read from; nothing is trained here."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import examination
from experiments import run as runs
from experiments.answering import adapter_digest
from experiments.checks import Checked, mesh_of
from experiments.config import MmluConfig, build_run
from experiments.report import METRICS
from qlora_jax.checkpoints import save_adapter
from qlora_jax.data import Batches, Examples, PackedBatches, Pair, Pairs, Seq2SeqBatches
from qlora_jax.evaluate import MmluResult
from qlora_jax.models import Decoder
from qlora_jax.nn import LoraConfig
from tests.random_decoder import ONE_LAYER, random_decoder
from tests.train.toy import Toy, adapters


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


def test_a_result_is_of_the_whole_run(tmp_path):
    def evaluation(loss: float) -> dict[str, float]:
        return {"eval_loss": loss, "eval_perplexity": 10 * loss, "eval_tokens": 9}

    lines = [
        {"step": 0, **evaluation(1.0)},
        {"step": 1, "loss": 3.5, "tokens": 5},
        {"step": 2, "loss": 3.0, "tokens": 7, "tokens_per_second": 10.0},
        {"step": 2, **evaluation(1.5)},
        {"step": 3, "loss": 2.5, "tokens": 11, "tokens_per_second": 20.0},
        {"step": 3, "mmlu_val_micro": 0.25},
        {"step": 3, **evaluation(2.0)},
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = Toy()
    result = runs._result(model, tmp_path, {"seed": "1"})
    assert result["before"] == {"loss": 1.0, "perplexity": 10.0, "tokens": 9}
    assert result["best"] == {"step": 2, "loss": 1.5, "perplexity": 15.0, "tokens": 9}
    assert result["after"] == {"loss": 2.0, "perplexity": 20.0, "tokens": 9}
    assert (result["steps"], result["trained_tokens"], result["tokens_per_second"]) == (3, 23, 20.0)
    assert result["adapter_parameters"] == sum(leaf.size for leaf in adapters(model))
    # Codes, absmax, and of these the absmax and the offset.
    assert result["base_bytes"] == 24 * 64 // 2 + 24 + 4 + 4
    assert result["labels"] == {"seed": "1"}


def test_with_keep_best_the_best_adapter_is_examined(tmp_path):
    def trained(seed: int) -> Decoder:
        return random_decoder(ONE_LAYER, seed=seed, lora=lora)

    lora = LoraConfig(r=2)
    for name, seed in (("adapter", 1), ("best", 2)):
        save_adapter(tmp_path / name, trained(seed), lora, "base")
    last, best = (adapter_digest(tmp_path / name) for name in ("adapter", "best"))
    model = trained(1)
    assert runs._load_examined(model, tmp_path, keep_best=False) == last
    jax.tree.map(np.testing.assert_array_equal, adapters(model), adapters(trained(1)))
    assert runs._load_examined(model, tmp_path, keep_best=True) == best
    jax.tree.map(np.testing.assert_array_equal, adapters(model), adapters(trained(2)))
    # No held-out loss was finite: none was the best.
    shutil.rmtree(tmp_path / "best")
    assert runs._load_examined(model, tmp_path, keep_best=True) == last


def test_what_a_resumed_run_is_compared_by():
    run = build_run({"quant": None, "train": {"steps": 7}, "devices": {"count": 2}}, "here")
    found = runs.identity(run)
    assert list(found) == ["model", "data", "quant", "lora"]
    assert (found["quant"], found["lora"]["r"]) == (None, 64)


def test_a_probe_asks_validation_questions_and_the_finished_model_those_that_count(
    tmp_path, monkeypatch
):
    asked = []

    def examine(model, tokenizer, questions, dev, **options):
        asked.append((questions, dev, options["shots"], options["max_len"], options["answers"]))
        return MmluResult({"virology": 1}, {"virology": 4})

    monkeypatch.setattr(examination, "questions_of", lambda *given: given)
    monkeypatch.setattr(examination, "examine", examine)
    config = MmluConfig(source="here", split="test", every=5, shots=3, limit=2)
    (probe,) = examination.probes(config, "tokenizer", 512)
    assert probe.every == 5
    assert probe.examine("model", 5) == {"mmlu_val_micro": 0.25, "mmlu_val_macro": 0.25}
    rest = ("model", "tokenizer", config, 4096, tmp_path, {}, None)
    assert examination.final(*rest)["mmlu"]["split"] == "test"
    # Solved questions are all there are; no prompt is longer than the paper's.
    dev = ("here", "dev", None)
    assert asked == [
        (("here", "val", 2), dev, 3, 512, None),
        (("here", "test", 2), dev, 3, 2048, tmp_path / "mmlu.jsonl"),
    ]
