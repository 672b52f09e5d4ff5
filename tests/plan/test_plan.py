"""Plans of a tiny model: on this machine's CPU, and for cards that are not here."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qlora_jax.cli import main
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Workload, check_fits, find_config, measure, plan
from qlora_jax.plan.advice import SWITCHES
from qlora_jax.plan.compiled import CACHE_VARIABLE, cache_folder
from qlora_jax.train import TrainConfig
from tests.memory.goals import needs_compiler

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WORK = Workload(
    find_config(TINY), sequence=32, train=TrainConfig(micro_batch_size=1), lora=LoraConfig(r=4)
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))


def test_components_add_up_to_the_compilers_total():
    made = plan(WORK)
    parameters = 2 * 4 * (4 * (128 + 128) + 3 * (128 + 256))
    assert made.device.adapters == made.device.gradients == 4 * parameters
    assert made.device.optimizer == pytest.approx(8 * parameters, abs=64)
    assert made.device.embeddings == 2 * 2 * 256 * 128
    assert made.device.temporaries > 0
    assert made.memory is None
    assert made.fits is None


def test_the_answer_is_kept_and_a_damaged_one_is_asked_anew():
    first = plan(WORK)
    (file,) = cache_folder().iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"temporaries": kept["temporaries"] + 1}))
    assert plan(WORK).device.total == first.device.total + 1
    file.write_text("{")
    assert plan(WORK).device.total == first.device.total


def test_a_run_that_does_not_fit_is_refused():
    assert check_fits(WORK) is None  # a CPU does not tell its memory
    assert check_fits(WORK, memory=2**30).device.total < 2**30
    with pytest.raises(ValueError, match=r"too much.*switch the check off"):
        check_fits(WORK, memory=2**16)


def test_the_vocabulary_is_packed_further_and_never_back():
    eight, four = (s for s in SWITCHES if s.name.startswith("embedding_bits"))
    assert eight.apply(WORK).embedding_bits == 8
    assert four.apply(eight.apply(WORK)).embedding_bits == 4
    assert eight.apply(four.apply(WORK)) is None
    # A 16-bit base is an experiment of its own.
    assert eight.apply(dataclasses.replace(WORK, quant=None)) is None


def test_the_planned_step_runs():
    found = measure(WORK, steps=1)
    assert np.isfinite(found.first_loss)
    assert found.tokens_per_second > 0


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="llama-65b"):
        find_config("llama-66b")


@needs_compiler
def test_the_command(tmp_path, capsys):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    out, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["plan", str(folder), "--card", "a6000", "--no-search", "--sequence", "32"]
    arguments += ["--embedding-bits", "8", "--rank", "4", "--decode-length", "16"]
    arguments += ["--json", str(out), "--plot", str(figure)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "matmul: xla, since Pallas does not know" in printed
    (found,) = json.loads(out.read_text())
    parts = found["device"]
    assert sum(parts[name] for name in parts if name != "total") == parts["total"]
    assert found["fits"]
    assert found["load"] > parts["base"]
    # INT8 with a float32 for each 64 of them.
    assert "vocabulary in 8 bits" in printed
    assert (found["embedding_bits"], parts["embeddings"]) == (8, 2 * 256 * 128 * 8.5 / 8)
    assert figure.stat().st_size > 1000


def test_the_command_needs_a_card(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    assert main(["plan", "llama-7b"]) == 2
    assert "--card" in capsys.readouterr().err
