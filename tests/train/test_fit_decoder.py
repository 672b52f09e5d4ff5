"""The default loss on the real parts: a decoder, `data.Batches`, a PEFT adapter at the end."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from qlora_jax.checkpoints import load_adapter, save_adapter
from qlora_jax.data import Batches
from qlora_jax.evaluate import perplexity
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig, fit
from tests.random_decoder import random_decoder
from tests.train.toy import Toy, ToyBatches

LORA = LoraConfig(r=4, alpha=8, lora_dropout=0.1)


def _decoder() -> Decoder:
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return random_decoder(config, quant=QuantConfig(), lora=LORA, matmul="xla")


def _examples(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Counting up modulo the vocabulary; the first two tokens are a prompt without loss."""
    rng = np.random.default_rng(1)
    found = []
    for length in rng.integers(6, 16, count):
        ids = ((rng.integers(32) + np.arange(length)) % 32).astype(np.int32)
        found.append((ids, np.where(np.arange(length) < 2, -100, ids).astype(np.int32)))
    return found


def test_a_quantized_decoder_is_finetuned_and_its_adapter_saved(tmp_path):
    model = _decoder()
    options = {"buckets": (8, 16), "pad_token_id": 0}
    train = Batches(_examples(40), batch_size=4, accumulation=2, seed=0, **options)
    held_out = Batches(_examples(6), batch_size=4, shuffle=False, **options)
    result = fit(
        model,
        train,
        TrainConfig(
            steps=25,
            learning_rate=2e-2,
            micro_batch_size=4,
            gradient_accumulation_steps=2,
            page_min_size=0,
        ),
        run_folder=tmp_path,
        eval_batches=held_out,
        save_adapter=lambda folder, model: save_adapter(folder, model, LORA, "toy"),
        console=Console(file=io.StringIO()),
    )
    assert result.last_eval.loss < result.first_eval.loss - 0.2
    fresh = _decoder()
    load_adapter(tmp_path / "adapter", fresh)
    again = perplexity(fresh, held_out.one_epoch())
    assert again.tokens == result.last_eval.tokens
    assert again.loss == pytest.approx(result.last_eval.loss, rel=1e-6)
    logits = model(jnp.asarray(held_out.at(0).input_ids))
    assert logits.dtype == jnp.float32
    assert all(
        leaf.sharding.memory_kind == "device"
        for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    )


@pytest.mark.slow
def test_neftune_is_in_the_training_loss_alone(tmp_path):
    def losses(folder: str, alpha: float | None, before: float | None):
        model = _decoder()
        # What a model was trained with before does not decide how it is trained now.
        model.neftune_noise_alpha = before
        batches = Batches(_examples(8), batch_size=4, seed=0, buckets=(16,), pad_token_id=0)
        config = TrainConfig(steps=1, micro_batch_size=4, neftune_noise_alpha=alpha, paged=False)
        result = fit(
            model,
            batches,
            config,
            run_folder=tmp_path / folder,
            eval_batches=[batches.at(0)],
            console=Console(file=io.StringIO()),
        )
        assert model.neftune_noise_alpha == alpha
        return result

    noisy = losses("noisy", 5.0, before=None)
    plain = losses("plain", None, before=50.0)
    assert noisy.first_eval.loss == plain.first_eval.loss
    assert abs(noisy.train_loss - plain.train_loss) > 1e-4


def test_neftune_needs_a_decoder(tmp_path):
    with pytest.raises(ValueError, match="Toy has no such noise, which is a Decoder's"):
        fit(Toy(), ToyBatches(4), TrainConfig(neftune_noise_alpha=5.0), run_folder=tmp_path)
