"""Folders and files that are written here, read by transformers, bitsandbytes and PEFT."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints import (
    cast,
    linear_weights,
    load_model,
    merge,
    open_checkpoint,
    quantized,
    save_checkpoint,
    save_gguf,
    save_model,
)
from qlora_jax.quant import QuantConfig
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder
from tests.shared import shared_path
from tests.vectors.qlora_run import logits

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")
pytestmark = pytest.mark.filterwarnings("default")

STORIES = "data/models/stories260K"
IDS = np.asarray([[1, 403, 407, 261, 378, 432, 383, 286, 261, 376]], np.int32)
F32 = {"lora": None, "compute_dtype": jnp.float32}


def their_logits(model, ids: np.ndarray) -> np.ndarray:
    for module in model.modules():
        # Else it repacks its weights at the first call, in bfloat16 (shared facts, bitsandbytes).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.float().numpy()


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(),
        QuantConfig(double_quant=False),
        QuantConfig("fp4"),
        QuantConfig("nf4", blocksize=128),
    ],
    ids=str,
)
def test_bitsandbytes_computes_with_our_4_bit_folder(quant, tmp_path):
    pytest.importorskip("bitsandbytes")
    # Of a prequantized folder transformers takes the dtype that the folder says, whatever is asked.
    base = cast(open_checkpoint(shared_path("vectors/llama/hf")), "float32")
    packed = quantized(base, linear_weights(base), quant)
    save_checkpoint(tmp_path / "packed", packed, max_shard_size="100KB")
    assert (tmp_path / "packed" / "model.safetensors.index.json").is_file()
    model = load(tmp_path / "packed")
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    ids = IDS % 256
    ours = logits(load_model(tmp_path / "packed", quant=quant, **F32), ids, None)
    np.testing.assert_allclose(their_logits(model, ids), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["bloom-even", "granite-scaled", "olmo2-biased", "smollm3-still", "starcoder2-window"]
)
def test_bitsandbytes_computes_with_other_families_in_4_bits(name, tmp_path):
    """Whose embedding, norms or MLP lie elsewhere than a Llama's. Rows are whole blocks: of others
    bitsandbytes' CPU code takes wrong scales."""
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    config = dataclasses.replace(VARIANTS[name], **shape)
    save_model(tmp_path / "dense", random_decoder(config))
    base = open_checkpoint(tmp_path / "dense")
    packed = quantized(base, linear_weights(base), QuantConfig())
    save_checkpoint(tmp_path / "packed", packed)
    ids = IDS % 48
    ours = logits(load_model(tmp_path / "packed", **F32), ids, None)
    theirs = their_logits(load(tmp_path / "packed"), ids)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


def test_transformers_reads_our_shards(tmp_path):
    base = open_checkpoint(shared_path(STORIES))
    save_checkpoint(tmp_path / "dense", base, max_shard_size="200KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    ours = logits(load_model(shared_path(STORIES), quant=None, **F32), IDS, None)
    np.testing.assert_allclose(their_logits(load(tmp_path / "dense"), IDS), ours, atol=1e-4, rtol=0)


def test_peft_merges_to_the_same_weights():
    peft = pytest.importorskip("peft")
    adapter = shared_path("data/reference/stories260K/adapter_trained")
    model = peft.PeftModel.from_pretrained(load(shared_path(STORIES)), adapter).merge_and_unload()
    theirs = model.state_dict()
    ours = merge(open_checkpoint(shared_path(STORIES)), adapter, "original")
    for name in ours.tensors:
        np.testing.assert_allclose(ours.read(name), theirs[name].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("file_type", ["F32", "Q8_0"])
def test_transformers_reads_our_gguf(file_type, tmp_path):
    base = open_checkpoint(shared_path(STORIES))
    save_gguf(tmp_path / "model.gguf", base, file_type)
    ours = logits(load_model(tmp_path / "model.gguf", quant=None, **F32), IDS, None)
    model = load(tmp_path, gguf_file="model.gguf")
    np.testing.assert_allclose(their_logits(model, IDS), ours, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "Once upon a time, there was a little girl"
    expected = transformers.LlamaTokenizer.from_pretrained(shared_path(STORIES))(text)
    assert tokenizer(text)["input_ids"] == expected["input_ids"]
