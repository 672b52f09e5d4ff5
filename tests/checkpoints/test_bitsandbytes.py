"""4-bit folders, written and damaged; what their numbers do in a model: tests/vectors."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints import (
    check_shapes,
    load_model,
    open_checkpoint,
    save_checkpoint,
    save_model,
)
from qlora_jax.quant import QuantConfig
from tests.checkpoints.tiny import change_config, change_tensors
from tests.shared import shared_path

FOLDER = shared_path("vectors/llama/bnb4")
NAME = "model.layers.0.mlp.up_proj.weight"


def same_files(ours: Path, theirs: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert first[name].dtype == tensor.dtype
        np.testing.assert_array_equal(first[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    "theirs",
    [
        "vectors/llama/bnb4",
        "vectors/llama/bnb4_bf16",
        *(f"data/reference/stories260K/bnb-{case}" for case in ("nf4", "nf4-dq", "fp4", "fp4-dq")),
    ],
)
def test_what_bitsandbytes_wrote_is_written_back_byte_for_byte(theirs, tmp_path):
    theirs = shared_path(theirs)
    save_checkpoint(tmp_path / "ours", open_checkpoint(theirs))
    same_files(tmp_path / "ours", theirs)
    ours, config = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", theirs)
    )
    assert ours == config


def test_a_model_in_memory_is_written_as_bitsandbytes_would(tmp_path):
    model = load_model(FOLDER, lora=None, compute_dtype=jnp.float32)
    save_model(tmp_path, model)
    same_files(tmp_path, FOLDER)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = json.loads((FOLDER / "config.json").read_text())
    assert config["quantization_config"] == expected["quantization_config"]


@pytest.fixture
def folder(tmp_path):
    for path in FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_codes_are_taken_over_byte_for_byte(folder):
    # The same bytes, as `quant_storage=bfloat16` would have written them.
    def as_bf16(tensors):
        codes.append(tensors[NAME].copy())
        tensors[NAME] = tensors[NAME].reshape(-1).view(jnp.bfloat16).reshape(-1, 1)

    codes: list[np.ndarray] = []
    change_tensors(folder, as_bf16)
    kernel = load_model(folder, lora=None).layers.mlp.up_proj.kernel.get_value()
    np.testing.assert_array_equal(kernel.codes[0].reshape(-1, 1), codes[0])
    assert kernel.bits_per_weight == pytest.approx(4.128, abs=2e-3)


@pytest.mark.parametrize("quant", [None, QuantConfig("fp4"), QuantConfig(double_quant=False)])
def test_another_quantization_than_the_folders(folder, quant):
    with pytest.raises(ValueError, match=r"quantized already, as QuantConfig\(quant_type='nf4'"):
        load_model(folder, quant=quant)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME + ".nested_absmax"), "lacks .*nested_absmax"),
        (lambda t: t.pop(NAME + ".quant_state.bitsandbytes__nf4"), "has no quant_state"),
        (lambda t: t.update({NAME: t[NAME][:-2]}), "bytes of codes, but its shape"),
        (lambda t: t.update({NAME + ".quant_map": np.ones(16, np.float32)}), "is not bitsandbytes"),
        (
            lambda t: t.update({NAME + ".nested_quant_map": np.ones(256, np.float32)}),
            "nested_quant_map' is not bitsandbytes'",
        ),
        (lambda t: say(t, nested_blocksize=128), "nested blocks of 128, but only 256 is read"),
        (lambda t: t.update({NAME: t[NAME].astype(np.float64)}), "stored as F64, but codes as U8"),
        (
            lambda t: t.update({NAME + ".absmax": t[NAME + ".absmax"][1:].copy()}),
            r"absmax' holds 511 numbers of U8, but .* calls for 512 of U8",
        ),
        (
            lambda t: t.update({NAME + ".absmax": t[NAME + ".absmax"].astype(np.float32)}),
            r"absmax' holds 512 numbers of F32, but .* calls for 512 of U8",
        ),
        (
            lambda t: t.update({NAME + ".nested_absmax": np.zeros(3, np.float32)}),
            r"nested_absmax' holds 3 numbers of F32, but .* calls for 2 of F32",
        ),
        (lambda t: say(t, nested_offset=None), "is no quant_state of bitsandbytes"),
        (lambda t: say(t, quant_type="int8"), "is no quant_state of bitsandbytes"),
        (lambda t: say(t, shape=[-1, 128]), "is no quant_state of bitsandbytes"),
        (lambda t: say(t, shape=[float("inf"), 128]), "is no quant_state of bitsandbytes"),
        (lambda t: say(t, dtype="float8"), "dtype is 'float8'"),
    ],
)
def test_damaged_weights(folder, damage, message):
    """Seen when the folder is opened or compared, before a weight is read."""
    change_tensors(folder, damage)
    with pytest.raises(ValueError, match=message) as error:
        check_shapes(open_checkpoint(folder))
    assert "\n" not in str(error.value)


def say(tensors, **fields) -> None:
    """Changes what the state of `NAME` says."""
    name = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes()) | fields
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()


@pytest.mark.parametrize("given", ["gptq", {"quant_method": "gptq"}])
def test_other_quantizations(folder, given):
    change_config(folder, quantization_config=given)
    with pytest.raises(ValueError, match="is quantized by 'gptq', but"):
        open_checkpoint(folder)


def test_a_folder_in_8_bits(tmp_path):
    dense = shared_path("vectors/llama/hf")
    (tmp_path / "model.safetensors").symlink_to((dense / "model.safetensors").resolve())
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    given = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    change_config(tmp_path, quantization_config=given)
    with pytest.raises(ValueError, match=r"by 'bitsandbytes', but .* 4-bit ones"):
        open_checkpoint(tmp_path)


def test_weights_that_are_quantized_in_two_ways():
    mixed = open_checkpoint(FOLDER)
    other = mixed.tensors[NAME]._replace(quant=QuantConfig("fp4"))
    mixed = replace(mixed, tensors={**mixed.tensors, NAME: other})
    with pytest.raises(ValueError, match=r"up_proj.* is stored as .*'fp4'.* but other weights as"):
        check_shapes(mixed)


def test_shapes_are_compared_through_the_state(folder):
    change_config(folder, intermediate_size=512)
    with pytest.raises(ValueError, match=r"has shape \[.*config.json calls for"):
        load_model(folder)
