import dataclasses
import json

import pytest

from qlora_jax.models import DecoderConfig, RopeConfig, family_of
from qlora_jax.models.families.llama import read_config, weight_names, write_config
from tests.shared import shared_path

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.mark.parametrize("name", ["llama/hf", "models/llama_ropescaled_tied"])
def test_configs_of_transformers_4_and_5_read_alike(name):
    folder = shared_path(f"vectors/{name}")
    new, old = (
        read_config(json.loads((folder / file).read_text()))
        for file in ("config.json", "config_legacy.json")
    )
    assert new == old
    assert read_config(write_config(new)) == new


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(rope_theta=5e5),
        RopeConfig(rope_type="linear", factor=2.0, original_max_position_embeddings=2048),
        RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=2048),
        RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=512, mscale=0.7),
        RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=512),
    ],
    ids=lambda rope: rope.rope_type,
)
def test_written_config_reads_back(rope):
    config = dataclasses.replace(CONFIG, rope=rope, qkv_bias=True, o_bias=True)
    assert read_config(json.loads(json.dumps(write_config(config)))) == config


def test_older_configs_leave_out_what_can_be_derived():
    given = write_config(CONFIG)
    for name in ("head_dim", "num_key_value_heads", "rope_scaling"):
        del given[name]
    config = read_config(given)
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"model_type 'mamba', but only .*: .*llama"):
        family_of({"model_type": "mamba"})
    with pytest.raises(ValueError, match="names no model_type"):
        family_of({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rope_scaling": {"type": "proportional"}}, "'proportional', but only"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        read_config(write_config(CONFIG) | change)


def test_one_bias_for_all_of_attention():
    with pytest.raises(ValueError, match="one attention_bias for both"):
        write_config(dataclasses.replace(CONFIG, qkv_bias=True))


def test_every_tensor_of_a_real_checkpoint_has_a_name():
    names = weight_names(dataclasses.replace(CONFIG, tie_word_embeddings=True, mlp_bias=True))
    assert len(names) == 2 + 3 * (2 + 7 + 3)
    assert names["model.layers.2.mlp.up_proj.bias"] == (("layers", "mlp", "up_proj", "bias"), 2)
