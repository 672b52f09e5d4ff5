"""4-bit folders in which some linear layers are dense: T5, RoBERTa and Mixtral beside transformers
and bitsandbytes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.checkpoints import (
    load_model,
    open_checkpoint,
    packable_weights,
    quantized,
    save_checkpoint,
    save_model,
)
from qlora_jax.quant import QuantConfig, QuantizedTensor
from tests.peers.models import (
    MODELS,
    our_logits,
    same,
    save_random,
    their_logits,
    theirs,
    torch,
    transformers,
)

pytest.importorskip("bitsandbytes", reason="make test-peers installs it")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders of random models by name."""
    root = tmp_path_factory.mktemp("dense")
    for name in MODELS:
        save_random(name, root / name)
    return root


def ours(folder, quant=QuantConfig()):
    return load_model(folder, quant=quant, lora=None, compute_dtype=jnp.float32)


def packed_in(folder) -> set[str]:
    names = load_file(folder / "model.safetensors")
    return {name.partition(".quant_state")[0] for name in names if ".quant_state" in name}


SKIPPED = [None, ["lm_head", "classifier"], ["v_proj", "v", "value"]]
# transformers itself fails on a tied head that its list does not name.
CASES = [(n, skip) for n in MODELS for skip in SKIPPED if (n, skip) != ("t5 v1.0", SKIPPED[2])]


@pytest.mark.parametrize(("name", "skip"), CASES)
def test_their_folder_here(name, skip, dense, tmp_path):
    """Whatever they kept dense or packed, heads too."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip,
    )
    peer = theirs(dense / name, quantization_config=config)
    peer.save_pretrained(tmp_path / "theirs")
    model = ours(tmp_path / "theirs")
    # The numbers that are codes there and nowhere else are codes here.
    kernels = {
        path[-2]: isinstance(value.get_value(), QuantizedTensor)
        for path, value in nnx.iter_graph(model)
        if path and path[-1] == "kernel"
    }
    packed = {n.removesuffix(".weight").rpartition(".")[2] for n in packed_in(tmp_path / "theirs")}
    assert {kernel for kernel, is_packed in kernels.items() if is_packed} == packed & kernels.keys()
    assert kernels.get("wo", False) is False
    same(our_logits(model), their_logits(peer))

    save_checkpoint(tmp_path / "again", open_checkpoint(tmp_path / "theirs"))
    assert packed_in(tmp_path / "again") == packed_in(tmp_path / "theirs")
    np.testing.assert_array_equal(their_logits(theirs(tmp_path / "again")), their_logits(peer))


def packed_by_bitsandbytes(name: str, weight) -> tuple[dict, "torch.Tensor"]:
    """The tensors of a 4-bit weight, and the numbers that they stand for."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = state.as_dict(packed=True)
    return {name: codes} | {f"{name}.{k}": v for k, v in parts.items()}, bnb.dequantize_4bit(
        codes, state
    )


def test_a_mixtral_of_transformers_4(dense, tmp_path):
    """Every linear layer in codes, the router among them, and each expert's by itself: what
    transformers 4 wrote and transformers 5 cannot read. Beside it a dense model of the same
    numbers."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(dense / "mixtral" / "model.safetensors")
    linears = [n for n in tensors if ".experts." in n or "self_attn" in n or ".gate." in n]
    packed, numbers = dict(tensors), dict(tensors)
    for name in linears:
        del packed[name]
        parts, numbers[name] = packed_by_bitsandbytes(name, tensors[name])
        packed |= parts
    config = json.loads((dense / "mixtral" / "config.json").read_text())
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}
    for folder, held, more in (
        ("four", packed, {"quantization_config": told}),
        ("numbers", numbers, {}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | more))
        save_torch(held, tmp_path / folder / "model.safetensors", {"format": "pt"})
    expected = their_logits(theirs(tmp_path / "numbers"))
    model = ours(tmp_path / "four")
    same(our_logits(model), expected)
    gate = model.layers.block_sparse_moe.gate[...][1]
    name = "model.layers.1.block_sparse_moe.gate.weight"
    np.testing.assert_array_equal(gate, numbers[name].numpy())

    save_checkpoint(tmp_path / "again", open_checkpoint(tmp_path / "four"))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == packed.keys()
    for name, tensor in packed.items():
        if "quant_state" not in name:
            np.testing.assert_array_equal(again[name], tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_our_folder_there(name, dense, tmp_path):
    base = open_checkpoint(dense / name)
    save_checkpoint(tmp_path / "packed", quantized(base, packable_weights(base), QuantConfig()))
    peer = theirs(tmp_path / "packed")
    linears = {n: m for n, m in peer.named_modules() if isinstance(m, torch.nn.Linear)}
    wide = {n for n, module in linears.items() if type(module) is torch.nn.Linear}
    assert wide == {n for n in linears if n.endswith((".wo", "lm_head")) or "classifier" in n}
    same(our_logits(ours(tmp_path / "packed")), their_logits(peer))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_our_model_there(name, dense, tmp_path):
    """In memory a T5's `wo` is in codes, too; in the folder it is what they stand for."""
    model = ours(dense / name)
    save_model(tmp_path, model)
    same(our_logits(model), their_logits(theirs(tmp_path)))
