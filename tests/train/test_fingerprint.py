"""What binds a run folder to a run without the caller's doing."""

import io
import json

import pytest
from flax import nnx
from rich.console import Console

from qlora_jax.nn import LoraConfig, QuantDense
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig, fit
from qlora_jax.train.fingerprint import fingerprint
from tests.train.toy import VOCABULARY, Toy, ToyBatches, toy_loss


def _toy(quant=QuantConfig(), **lora):
    model = Toy()
    model.head = QuantDense(
        64,
        VOCABULARY,
        quant=quant,
        lora=LoraConfig(**{"r": 4, "alpha": 8, **lora}),
        rngs=nnx.Rngs(0),
    )
    return model


class _Shifted(ToyBatches):
    def at(self, step):
        return super().at(step + 1)


def test_in_words():
    model = nnx.List([_toy(), _toy(), _toy(QuantConfig("fp4", 128, False), use_dora=True)])
    found = fingerprint(model, ToyBatches(4))
    assert found.pop("first_batch").startswith("sha256:")
    assert found == {
        "adapters": "1 × DoRA r=4 scaling=2 dropout=0; 2 × LoRA r=4 scaling=2 dropout=0",
        "quantized": "1 × fp4 in blocks of 128, absmax in float32; "
        "2 × nf4 in blocks of 64, double quantization",
    }
    dense = fingerprint(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ToyBatches(4))
    assert dense["adapters"] == dense["quantized"] == "none"
    again, other = (fingerprint(model, batches(4)) for batches in (ToyBatches, _Shifted))
    assert again["first_batch"] != other["first_batch"]
    assert again == fingerprint(model, ToyBatches(4))


@pytest.mark.parametrize(
    ("changed", "batches", "named"),
    [
        ({"alpha": 16}, ToyBatches, r"adapters \(was '1 × LoRA r=4 scaling=2 .*, is .* scaling=4"),
        ({"lora_dropout": 0.1}, ToyBatches, "adapters"),
        ({"quant": QuantConfig("fp4")}, ToyBatches, "quantized"),
        ({"quant": None}, ToyBatches, r"quantized \(was '1 × nf4 .*, is 'none'"),
        ({}, _Shifted, "first_batch"),
    ],
)
def test_another_run_is_refused_on_resuming(changed, batches, named, tmp_path):
    def run(steps, model, batches, free=()):
        config = TrainConfig(steps=steps, micro_batch_size=4)
        console = Console(file=io.StringIO())
        fit(
            model,
            batches(4),
            config,
            run_folder=tmp_path,
            loss_fn=toy_loss,
            identity_free=free,
            console=console,
        )
        return console.file.getvalue()

    run(1, _toy(), ToyBatches)
    with pytest.raises(ValueError, match=f"these fields differ: {named}"):
        run(2, _toy(**changed), batches)
    assert "resumed after step 1" in run(2, _toy(), ToyBatches)
    named = named.split(" ")[0]
    assert "resumed after step 2" in run(3, _toy(**changed), batches, [named])


def test_a_run_of_an_older_version_is_not_asked(tmp_path):
    def run(steps, **lora):
        config = TrainConfig(steps=steps, micro_batch_size=4)
        console = Console(file=io.StringIO())
        fit(
            _toy(**lora),
            ToyBatches(4),
            config,
            run_folder=tmp_path,
            loss_fn=toy_loss,
            console=console,
        )

    run(1)
    path = tmp_path / "config.json"
    text = path.read_text()
    assert '"found"' in text
    path.write_text(text.replace('"found"', '"unknown"'))
    run(2, alpha=16)
    assert json.loads(path.read_text())["train"]["steps"] == 2
