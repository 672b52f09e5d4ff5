"""Where the weights of a model lie after it was spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.models import Decoder, DecoderConfig, shardings_of, spread, spread_rows, streaming
from qlora_jax.nn import LoraConfig, add_lora
from qlora_jax.quant import QuantConfig

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
)
MESH = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def decoder(**options) -> Decoder:
    lora = LoraConfig(r=2, target_modules=("q_proj", "down_proj"))
    return Decoder(CONFIG, lora=lora, rngs=nnx.Rngs(0), **options)


def shards(model: Decoder) -> dict[str, tuple[int, ...]]:
    """What the first device holds, by the end of a weight's path."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))[0]:
        name = ".".join(jax.tree_util.keystr((part,), simple=True) for part in path)
        found[name.removeprefix("layers.")] = leaf.addressable_shards[0].data.shape
        assert len(leaf.sharding.device_set) == 4
    return found


def test_codes_absmax_and_adapters_are_cut_with_their_rows():
    model = decoder(quant=QuantConfig(), embedding_bits=8)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    spread(model, MESH, over="data")
    found = shards(model)
    # 128 columns are 64 bytes a row, and 128 blocks of 64.
    assert found["mlp.down_proj.kernel.codes"] == (3, 64 // 4, 64)
    assert found["mlp.down_proj.kernel.absmax"] == (3, 128 // 4)
    assert found["mlp.down_proj.kernel.offset"] == (3,)
    assert found["mlp.down_proj.lora_A"] == (3, 2, 128 // 4)
    assert found["mlp.down_proj.lora_B"] == (3, 64 // 4, 2)
    for name in ("embed_tokens", "lm_head"):
        assert found[f"{name}.weight.codes"] == (64, 64 // 4)
        assert found[f"{name}.weight.absmax"] == (64,)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model)), strict=True):
        assert (a == b).all()


def test_a_is_cut_by_rows_if_they_divide():
    lora = LoraConfig(r=8, target_modules=("q_proj",))
    model = Decoder(CONFIG, lora=lora, rngs=nnx.Rngs(0))
    spread(model, MESH, over="data")
    assert shards(model)["self_attn.q_proj.lora_A"] == (3, 8 // 4, 64)


def test_dense_weights_are_cut_and_what_does_not_divide_is_whole():
    model = decoder()
    model.layers.mlp.down_proj.lora_A.set_value(jnp.zeros((3, 2, 30)))
    spread(model, MESH, over="data")
    found = shards(model)
    assert found["self_attn.q_proj.kernel"] == (3, 64 // 4, 64)
    assert found["lm_head.weight"] == (64, 64 // 4)
    assert found["mlp.down_proj.lora_A"] == (3, 2, 30)


def test_without_an_axis_every_device_has_all_of_it():
    model = decoder(quant=QuantConfig())
    spread(model, MESH)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(model)))


def test_what_rests_on_the_host_stays_there(monkeypatch):
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 256)
    model = decoder(quant=QuantConfig())
    streaming.move_to_host(model.layers)
    spread(model, MESH, over="data")
    codes = model.layers.self_attn.q_proj.kernel.get_value().codes
    assert codes.sharding.memory_kind == "pinned_host"
    assert codes.addressable_shards[0].data.shape == (3, 64 // 4, 32)


def test_shapes_alone_say_where_arrays_will_lie():
    def build():
        return decoder(quant=QuantConfig(), embedding_bits=8)

    planned = shardings_of(nnx.eval_shape(build), MESH, over="data")
    model = build()
    spread(model, MESH, over="data")
    variables = dict(nnx.iter_graph(model))
    for path, shardings in planned.items():
        lie = jax.tree.map(lambda leaf: leaf.sharding, variables[path].get_value())
        assert jax.tree.leaves(lie) == jax.tree.leaves(shardings)


def test_rows_go_where_the_model_is():
    model = decoder()
    batch = {"ids": np.arange(24).reshape(8, 3), "odd": np.arange(6), "all": np.float32(1)}
    assert spread_rows(batch, nnx.state(model)) is batch
    spread(model, MESH)
    placed = spread_rows(batch, nnx.state(model))
    assert [shard.data.shape for shard in placed["ids"].addressable_shards] == [(2, 3)] * 4
    np.testing.assert_array_equal(placed["ids"], batch["ids"])
    # What does not divide is every device's.
    assert placed["odd"] is batch["odd"]
    assert placed["all"] is batch["all"]
    micro = spread_rows(np.zeros((2, 4, 3)), nnx.state(model), axis=1)
    assert micro.addressable_shards[0].data.shape == (2, 1, 3)
    assert spread_rows(micro, nnx.state(model)) is micro


def test_meshes_that_do_not_serve_are_refused():
    with pytest.raises(ValueError, match="the mesh has the axes 'data'"):
        spread(decoder(), MESH, over="model")
    explicit = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"make it with axis_types=\(jax.sharding.AxisType.Auto,"):
        spread(decoder(), explicit)


@pytest.mark.usefixtures("as_users_run_it")
def test_devices_are_no_mesh():
    with pytest.raises(TypeError, match=r"^mesh is \[.*\], but a jax.sharding.Mesh is needed"):
        spread(decoder(), jax.devices())


@pytest.mark.parametrize("over", ["data", None])
def test_adapters_that_come_later_lie_where_spread_would_put_them(over):
    lora = LoraConfig(r=2, target_modules=("q_proj", "down_proj"))
    names = {"layers.self_attn.q_proj": ["q_proj"] * 3, "layers.mlp.down_proj": ["down_proj"] * 3}
    model = Decoder(CONFIG, quant=QuantConfig(), rngs=nnx.Rngs(0))
    spread(model, MESH, over=over)
    add_lora(model, lora, rngs=nnx.Rngs(0), names=names)
    adapters = nnx.state(model, nnx.LoRAParam)
    lie = [leaf.sharding for leaf in jax.tree.leaves(adapters)]
    spread(model, MESH, over=over)
    assert lie == [leaf.sharding for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
    assert len(lie) == 4
