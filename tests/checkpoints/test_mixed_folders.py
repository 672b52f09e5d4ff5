"""4-bit folders in which some linear layers are dense; beside transformers itself: tests/peers."""

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.checkpoints import (
    Checkpoint,
    TensorInfo,
    load_model,
    packable_weights,
    quantized,
    save_checkpoint,
    save_model,
)
from qlora_jax.checkpoints.dense_modules import _short, skip_modules
from qlora_jax.checkpoints.matching import node_at
from qlora_jax.models import FAMILIES, family_of
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize, row_config
from tests.checkpoints.tiny import CONFIG as LLAMA
from tests.checkpoints.tiny import change_tensors
from tests.models.test_encoder import CONFIG as ROBERTA
from tests.models.test_encoder_decoder import CONFIG as T5
from tests.models.variants import VARIANTS

MIXTRAL = dataclasses.replace(VARIANTS["mixtral-window"], num_hidden_layers=2)
CONFIGS = {"t5": T5, "roberta": ROBERTA, "mixtral": MIXTRAL, "llama": LLAMA}
F32: dict[str, Any] = {"lora": None, "compute_dtype": jnp.float32}


def random_checkpoint(config: Any) -> Checkpoint:
    """A dense checkpoint of a model that is never built: every tensor drawn by NumPy."""
    family, rng = FAMILIES[config.model_type], np.random.default_rng(0)
    model = nnx.eval_shape(lambda: family.build(config, quant=None, rngs=nnx.Rngs(0)))
    arrays = {
        name: rng.normal(size=node_at(model, slot.path).get_value().shape[len(slot.stack_index) :])
        for name, slot in family.weight_names(config).items()
    }
    tensors = {name: TensorInfo(array.shape, "F32") for name, array in arrays.items()}
    read = lambda name: arrays[name].astype(np.float32)  # noqa: E731
    return Checkpoint(Path(config.model_type), family.write_config(config), tensors, read)


@pytest.fixture(scope="module")
def dense() -> dict[str, Checkpoint]:
    """Dense checkpoints by family."""
    return {name: random_checkpoint(config) for name, config in CONFIGS.items()}


def in_4_bits(base: Checkpoint, *but: str, more: tuple[str, ...] = ()) -> Checkpoint:
    """The checkpoint with the layers' weights in codes but for some, by pattern, and with more."""
    linears = {
        name
        for name in packable_weights(base) | {n for n in base.tensors if n.endswith(more)}
        if not any(fnmatchcase(name, pattern) for pattern in but)
    }
    return quantized(base, linears, QuantConfig())


def listed(folder) -> list[str] | None:
    config = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]["llm_int8_skip_modules"]


# Per family: what its folder holds dense, by the last parts of names, and what its list says.
WRITTEN = {
    "t5": ({"wo", "shared", "relative_attention_bias", "lm_head"}, None),
    "roberta": (
        {"word_embeddings", "position_embeddings", "token_type_embeddings"}
        | {"classifier.dense", "classifier.out_proj"},
        ["classifier"],
    ),
    "mixtral": ({"embed_tokens", "lm_head", "gate"}, ["lm_head", "gate"]),
    "llama": ({"embed_tokens", "lm_head"}, None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_folder_holds_by_name_and_dtype(name, dense, tmp_path):
    save_checkpoint(tmp_path / "packed", in_4_bits(dense[name]))
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    ends, expected = WRITTEN[name]
    matrices = {n: t for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2}
    for tensor, value in matrices.items():
        module = tensor.removesuffix(".weight")
        wide = any(f".{module}".endswith(f".{end}") for end in ends)
        assert value.dtype == (np.float32 if wide else np.uint8), tensor
        state = f"{tensor}.quant_state.bitsandbytes__nf4"
        assert (state in tensors) != wide, tensor
    found = {n for n in matrices if matrices[n].dtype == np.float32}
    np.testing.assert_equal({n: tensors[n] for n in found}, {n: dense[name].read(n) for n in found})
    assert listed(tmp_path / "packed") == expected


MIXES = [
    ("t5", ("*.EncDecAttention.v.weight",), ()),
    ("roberta", ("*.query.weight",), ("classifier.dense.weight", "classifier.out_proj.weight")),
    ("mixtral", ("*.experts.*",), ()),  # as transformers 5 writes it
    ("mixtral", (), (".gate.weight",)),  # as transformers 4 does
    ("llama", ("*.down_proj.weight",), ("lm_head.weight",)),
]


@pytest.mark.parametrize(("name", "but", "more"), MIXES)
def test_what_the_folder_holds_dense_stays_dense(name, but, more, dense, tmp_path):
    """Codes stay codes, dense numbers dense; a router's or head's codes become their numbers."""
    checkpoint = in_4_bits(dense[name], *but, more=more)
    save_checkpoint(tmp_path / "mixed", checkpoint)
    model = load_model(tmp_path / "mixed", **F32)
    for tensor, slot in family_of(checkpoint.config).weight_names(model.config).items():
        there, here = checkpoint.read(tensor), node_at(model, slot.path).get_value()
        if slot.path[-1] == "kernel":
            assert isinstance(here, QuantizedTensor) == isinstance(there, QuantizedTensor), tensor
        elif isinstance(there, QuantizedTensor):
            there = jax.tree.map(jnp.asarray, there).dequantize(jnp.float32)
        mine = jax.tree.map(lambda leaf, at=slot.stack_index: leaf[at], here)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(there), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=tensor)


def test_a_model_in_memory_has_its_wo_written_as_numbers(dense, tmp_path):
    model = load_model(dense["t5"], **F32)
    kernel = model.encoder.layers.DenseReluDense.wo.kernel.get_value()
    assert isinstance(kernel, QuantizedTensor)
    save_model(tmp_path, model)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    written = load_file(tmp_path / "model.safetensors")[name]
    np.testing.assert_array_equal(written, kernel.dequantize(jnp.float32)[1])
    assert listed(tmp_path) is None


NAMED = [
    ("llama", ("*.q_proj.*", "*.mlp.*"), ()),
    ("mixtral", ("*.experts.*",), ()),
    ("mixtral", ("*.layers.1.*.experts.2.*",), (".gate.weight",)),
    ("t5", ("*.EncDecAttention.q.*",), ()),
    ("roberta", ("*.intermediate.dense.*",), ("classifier.dense.weight",)),
]


@pytest.mark.parametrize(("name", "but", "more"), NAMED)
def test_the_list_means_what_is_dense_and_nothing_else(name, but, more, dense):
    checkpoint = in_4_bits(dense[name], *but, more=more)
    entries = skip_modules(checkpoint)
    ends = ("lm_head.weight", ".gate.weight", "classifier.dense.weight")
    others = {tensor for tensor in checkpoint.tensors if tensor.endswith(ends)}
    for tensor in packable_weights(dense[name]) | others:
        module = tensor.removesuffix(".weight")
        wide = checkpoint.tensors[tensor].quant is None
        last = module.rpartition(".")[2]
        # transformers 4: the whole name, its last part, or a part of it that ends at a dot.
        four = any(entry in (module, last) or f"{entry}." in module for entry in entries)
        # transformers 5: what a name begins with, up to a dot, or ends in.
        five = any(f"{module}.".startswith(f"{e}.") or module.endswith(e) for e in entries)
        assert four == five == wide, tensor


def test_the_list_is_null_where_transformers_needs_none(dense):
    assert skip_modules(in_4_bits(dense["mixtral"], more=(".gate.weight",))) is None
    assert skip_modules(in_4_bits(dense["llama"], more=("lm_head.weight",))) == []


def test_a_head_that_transformers_5_calls_otherwise_is_listed_by_both_names():
    """Else a GPT-NeoX's `lm_head` would become a 4-bit layer there, with numbers for codes."""
    base = random_checkpoint(VARIANTS["gpt_neox-serial"])
    mixed = in_4_bits(base, "*.query_key_value.weight")
    assert skip_modules(mixed) == ["embed_out", "lm_head", "query_key_value"]
    assert skip_modules(in_4_bits(base)) is None


def test_a_short_name_means_nothing_packed_to_transformers_4_or_5():
    """5 asks how a module's name ends, 4 whether it has a part of this name."""
    assert _short("b.wo", {"b.two"}) == "b.wo"
    assert _short("mlp.wi", {"layer.mlp.up"}) == "wi"


def test_layers_of_one_stack_that_differ(dense, tmp_path):
    mixed = in_4_bits(dense["llama"], "model.layers.1.mlp.up_proj.weight")
    save_checkpoint(tmp_path / "mixed", mixed)
    assert "model.layers.1.mlp.up_proj" in listed(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*is dense, but .*layers\.0"):
        load_model(tmp_path / "mixed")


def test_a_dense_weight_of_another_shape(dense, tmp_path):
    save_checkpoint(tmp_path / "packed", in_4_bits(dense["t5"]))
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    change_tensors(tmp_path / "packed", lambda t: t.update({name: t[name][:-1].copy()}))
    with pytest.raises(ValueError, match=r"wo.weight.*has shape .* config.json calls"):
        load_model(tmp_path / "packed")


def test_a_head_in_codes_is_packed_anew_if_asked(dense, tmp_path):
    """From the numbers of the folder's codes; the embedding from the folder's own."""
    checkpoint = in_4_bits(dense["llama"], more=("lm_head.weight",))
    model = load_model(checkpoint, embedding_bits=8, **F32)
    packed = jax.tree.map(jnp.asarray, checkpoint.read("lm_head.weight"))
    numbers = {
        "lm_head": packed.dequantize(jnp.float32),
        "embed_tokens": dense["llama"].read("model.embed_tokens.weight"),
    }
    for name, expected in numbers.items():
        found = getattr(model, name).weight.get_value()
        assert found.quant_type != "nf4"
        np.testing.assert_array_equal(
            found.dequantize(jnp.float32),
            quantize(expected, row_config(8, expected.shape[1])).dequantize(jnp.float32),
        )
