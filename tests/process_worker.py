"""What `test_processes` has done by one process of four devices, and by two of two each."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from experiments.cli import join_cluster
from qlora_jax.checkpoints import load_model
from qlora_jax.generate import GenerationConfig, generate
from qlora_jax.processes import are_several, distribute, from_first, on_first, whole
from qlora_jax.train import TrainConfig, fit

LORA = ql.LoraConfig(r=4, target_modules=("q_proj", "down_proj"))
PROMPTS = [[1, 2, 3], [4, 5], [7, 8, 9, 10]]
IDS = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


class Batch(NamedTuple):
    input_ids: Any
    labels: Any


class Batches:
    def at(self, step):
        return Batch(np.roll(IDS, step, 0), IDS)


def work(model_folder: Path, out: Path) -> dict[str, Any]:
    """Trains with streamed weights, writes the adapter, reads it back, generates."""
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    place = {"mesh": mesh, "over": "data"}
    _arrays_go_there_and_back(mesh)
    model = load_model(model_folder, lora=LORA, stream_weights=True, remat="full", **place)
    config = TrainConfig(steps=2, micro_batch_size=8, page_min_size=0, learning_rate=1e-2)
    trained = fit(
        model, Batches(), config, run_folder=out,
        save_adapter=lambda folder, m: ql.save_adapter(folder, m, LORA, str(model_folder)),
    )  # fmt: skip
    model_again = load_model(model_folder, lora=LORA, **place)
    ql.load_adapter(out / "adapter", model_again)
    states = [jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (model, model_again)]
    for ours, read in zip(*states, strict=True):
        assert read.sharding.is_equivalent_to(ours.sharding, ours.ndim)
        np.testing.assert_array_equal(whole(read), whole(ours))
    greedy, sampled = GenerationConfig(8), GenerationConfig(8, temperature=1.0)
    written = [
        # Four rows divide, three do not: then every device has them all.
        *generate(model_again, PROMPTS, greedy, batch_size=4),
        *generate(
            model_again, PROMPTS, sampled, key=jax.random.key(1), batch_size=3,
            on_tokens=lambda _row, tokens: len(tokens) > 4, every=2,
        ),
    ]  # fmt: skip
    return {"loss": trained.train_loss, "written": [list(item.tokens) for item in written]}


def _arrays_go_there_and_back(mesh: jax.sharding.Mesh) -> None:
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    given = np.array([-0.0, np.nan, 1.5, np.inf] * 2, np.float32)
    for array in (given, jax.numpy.asarray(given)):
        there = distribute(array, rows)
        assert there.sharding == rows
        assert whole(there).tobytes() == given.tobytes()
    key = jax.random.key(3)
    np.testing.assert_array_equal(
        whole(jax.random.key_data(distribute(key, jax.NamedSharding(mesh, jax.P())))),
        jax.random.key_data(key),
    )
    is_first = jax.process_index() == 0
    mine = given if is_first else np.zeros_like(given)
    assert from_first(mine).tobytes() == given.tobytes()
    assert on_first(lambda: {"who": jax.process_index()}) == {"who": 0}
    told = (ZeroDivisionError, "^division") if is_first else (RuntimeError, "ZeroDivisionError")
    with pytest.raises(told[0], match=told[1]):
        on_first(lambda: 1 / 0)
    assert are_several() == (jax.process_count() > 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cluster")
    options = parser.parse_args()
    join_cluster(options.cluster)
    print(json.dumps(work(options.model, options.out)))
