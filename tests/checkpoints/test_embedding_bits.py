"""Embedding and head from a checkpoint straight to codes, and back into files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import qlora_jax as ql
from qlora_jax.checkpoints import fill, load_model, open_checkpoint, quantized, save_model
from qlora_jax.checkpoints.matching import linear_weights
from qlora_jax.checkpoints.save import save_checkpoint
from qlora_jax.models import FAMILIES, EncoderClassifier
from qlora_jax.quant import QuantizedTensor, quantize, row_config
from tests.checkpoints.tiny import write_model

OPTIONS = {"lora": None, "compute_dtype": jnp.float32, "progress": False}
NAMES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_the_files_numbers(folder, bits, monkeypatch) -> None:
    """Read seven rows at a time, 24 equal those that are quantized in one piece."""
    seen = []

    def pieces(rows, config):
        if config == row_config(bits, 32):
            seen.append(rows.shape)
        return quantize(rows, config)

    monkeypatch.setattr(fill, "rows_at_once", lambda width: 7)
    monkeypatch.setattr(fill, "quantize", pieces)
    model = load_model(folder, embedding_bits=bits, **OPTIONS)
    assert seen == 2 * [*[(7, 32)] * 3, (3, 32)]
    tensors = load_file(folder / "model.safetensors")
    for module, name in NAMES.items():
        found = getattr(model, module).weight.get_value()
        expected = quantize(tensors[name], row_config(bits, 32))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_4_bit_folder_keeps_its_vocabulary_dense(folder, tmp_path) -> None:
    """Such a folder is read with a packed vocabulary, and a model with one is written as one."""
    checkpoint = open_checkpoint(folder)
    quant = ql.QuantConfig()
    save_checkpoint(tmp_path / "nf4", quantized(checkpoint, linear_weights(checkpoint), quant))
    model = load_model(tmp_path / "nf4", embedding_bits=8, **OPTIONS)
    assert isinstance(model.embed_tokens.weight.get_value(), QuantizedTensor)
    save_model(tmp_path / "again", model)
    written = open_checkpoint(tmp_path / "again")
    assert written.quant == quant
    for module, name in NAMES.items():
        weight = getattr(model, module).weight.get_value()
        assert isinstance(weight, QuantizedTensor)
        assert written.tensors[name].quant is None
        np.testing.assert_array_equal(written.read(name), weight.dequantize())


def test_what_cannot_be(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"trainable_base .* embedding_bits=8"):
        load_model(folder, quant=None, trainable_base=True, embedding_bits=8, **OPTIONS)
    with pytest.raises(ValueError, match="embedding_bits is 16, but 8 or 4"):
        load_model(folder, embedding_bits=16, **OPTIONS)
    roberta = FAMILIES["roberta"].read_config(
        {"model_type": "roberta", "vocab_size": 24, "hidden_size": 32, "num_attention_heads": 4}
        | {"num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 20}
    )
    save_model(tmp_path / "roberta", EncoderClassifier(roberta, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="is an EncoderClassifier, which has no head over the"):
        load_model(tmp_path / "roberta", embedding_bits=8, **OPTIONS)
