import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.checkpoints import load_adapter, read_adapter_config, save_adapter
from qlora_jax.models import Decoder
from qlora_jax.nn import LoraConfig, QuantDense
from tests.checkpoints.tiny import CONFIG
from tests.random_decoder import random_decoder

LORA = LoraConfig(r=4, alpha=8, lora_dropout=0.1, target_modules=("q_proj", "down_proj"))


def model(lora: LoraConfig | None = LORA, seed: int = 0) -> Decoder:
    return random_decoder(CONFIG, lora=lora, seed=seed)


@pytest.fixture
def saved(tmp_path):
    trained = model()
    nnx.update(trained, jax.tree.map(lambda x: x + 0.5, nnx.state(trained, nnx.LoRAParam)))
    save_adapter(tmp_path, trained, LORA, "base/name")
    return tmp_path, trained


def test_round_trip_is_bit_for_bit(saved):
    folder, trained = saved
    fresh = model(read_adapter_config(folder), seed=1)
    load_adapter(folder, fresh)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(fresh, nnx.LoRAParam),
        nnx.state(trained, nnx.LoRAParam),
    )


def test_names_and_config_are_pefts(saved):
    folder, trained = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * CONFIG.num_hidden_layers
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    np.testing.assert_array_equal(tensors[name], trained.layers.mlp.down_proj.lora_B.get_value()[1])
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "base_model_name_or_path": "base/name",
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["down_proj", "q_proj"],
        "use_rslora": False,
    }
    assert expected.items() <= config.items()
    read = read_adapter_config(folder)
    assert (read.r, read.alpha, read.scaling) == (4, 8, 2.0)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(r=8, alpha=16, target_modules=LORA.target_modules), "rank or on another base"),
        (LoraConfig(r=4, alpha=16, target_modules=LORA.target_modules), "scales its adapters by 2"),
        (LoraConfig(r=4, alpha=8), "lacks .*but the model adapts"),
        (LoraConfig(r=4, alpha=8, target_modules=("q_proj",)), "that the model does not adapt"),
        (None, "that the model does not adapt"),
    ],
)
def test_adapter_of_another_shape_leaves_the_model_as_it_was(saved, lora, message):
    other = model(lora)
    before = nnx.state(other, nnx.LoRAParam)
    with pytest.raises(ValueError, match=message):
        load_adapter(saved[0], other)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(other, nnx.LoRAParam))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("lora_bias", True),
    ],
)
def test_what_is_not_supported_is_refused(saved, field, value):
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=field):
        load_adapter(saved[0], model())


def test_damaged_or_missing_files(saved):
    folder, _ = saved
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is truncated or no safetensors"):
        load_adapter(folder, model())
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is a pickle"):
        load_adapter(folder, model())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"give an adapter's folder"):
        load_adapter(folder, model())


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(tmp_path / "new", model(None), LORA, "base")
    assert not (tmp_path / "new").exists()


def test_a_module_of_ones_own_is_told_of_orbax(saved, tmp_path):
    own = QuantDense(32, 32, lora=LORA, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"QuantDense, but PEFT's format .* with Orbax"):
        save_adapter(tmp_path / "new", own, LORA, "base")
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="QuantDense"):
        load_adapter(saved[0], own)


def test_rank_stabilised_scaling_travels(tmp_path):
    lora = LoraConfig(r=4, alpha=8, use_rslora=True, target_modules=("q_proj",), dtype=jnp.bfloat16)
    save_adapter(tmp_path, model(lora), lora, tmp_path / "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{tmp_path}/base"
    assert read_adapter_config(tmp_path).scaling == 4.0
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"bfloat16"}


def test_a_run_folder_is_told_apart_from_the_adapter_in_it(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"save_pretrained wrote it \(\S+adapter is one\)"):
        read_adapter_config(tmp_path)
