"""A model that is spread over devices as it is read: the bits of one device, and no device ever
holds more than its part and a tensor or two."""

import dataclasses
import gc
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoints import fill, load, load_adapter, load_model, save_adapter, save_model
from qlora_jax.models import DecoderConfig, spread, streaming
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from tests.random_decoder import random_decoder

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
)
MESH = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
LORA = LoraConfig(r=4, target_modules=("q_proj", "down_proj"))
DORA = dataclasses.replace(LORA, use_dora=True)
LOFTQ = LoraConfig(r=4, target_modules=("q_proj",), init_lora_weights="loftq")
ADAPTERS = 4 * LORA.r * CONFIG.num_hidden_layers * (CONFIG.intermediate_size + CONFIG.hidden_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    save_model(folder, random_decoder(CONFIG), dtype=jnp.dtype(jnp.bfloat16))
    return folder


@pytest.fixture(scope="module")
def packed_folder(folder, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed")
    save_model(packed, load_model(folder, lora=None))
    return packed


def bytes_by_device(arrays) -> Counter:
    held = Counter()
    for array in arrays:
        # Not from `addressable_shards`: looking at their data makes arrays that count once more.
        size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        held.update({device.id: size for device in array.sharding.device_set})
    return held


@pytest.fixture
def most(monkeypatch):
    """The most that each device held at once while a model was read, beside what it held before."""
    gc.collect()
    others = jax.live_arrays()  # kept, so that none of their ids is given to another array
    known = set(map(id, others))
    most = Counter()

    def watched(function):
        def call(*args):
            result = function(*args)
            alive = (array for array in jax.live_arrays() if id(array) not in known)
            for device, size in bytes_by_device(alive).items():
                most[device] = max(most[device], size)
            return result

        return call

    # Whatever is called with a tensor: it is alive still when its result is.
    for name in ("quantize", "put", "put_piece", "_brought"):
        monkeypatch.setattr(fill, name, watched(getattr(fill, name)))
    adapt = load.add_lora
    monkeypatch.setattr(
        load,
        "add_lora",
        lambda *args, place, **options: adapt(*args, place=place and watched(place), **options),
    )
    return most


@pytest.mark.parametrize(
    "options",
    [
        {"quant": QuantConfig(), "embedding_bits": 8},
        pytest.param({"quant": None, "lora": DORA}, marks=pytest.mark.slow),
        pytest.param({"stream_weights": True, "lora": LOFTQ}, marks=pytest.mark.slow),
    ],
)
def test_each_device_gets_its_part_and_the_bits_are_those_of_one_device(
    folder, options, most, monkeypatch
):
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 2**10)
    options = {"lora": LORA, **options}
    cut = load_model(folder, mesh=MESH, over="data", **options)
    held = dict(most)
    one = load_model(folder, **options)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(one)))
    spread(one, MESH, over="data")
    leaves = list(map(jax.tree.leaves, (nnx.state(cut), nnx.state(one))))
    for ours, theirs in zip(*leaves, strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        assert ours.sharding.memory_kind == theirs.sharding.memory_kind
        np.testing.assert_array_equal(ours, theirs)
    parts = bytes_by_device(leaves[0])
    # One tensor and what becomes of it, or a module's adapters of all layers, before it is cut.
    beside = max(3 * CONFIG.vocab_size * CONFIG.hidden_size, ADAPTERS)
    for device in MESH.devices.flat:
        assert parts[device.id] <= held[device.id] < parts[device.id] + beside
        assert held[device.id] < whole / 2


def test_what_is_packed_already_passes_through_no_device(packed_folder, most):
    model = load_model(packed_folder, lora=None, mesh=MESH, over="data")
    parts = bytes_by_device(jax.tree.leaves(nnx.state(model)))
    # Beside what it keeps a device holds its part of one tensor, and what is too small to be cut.
    largest = 2 * CONFIG.vocab_size * CONFIG.hidden_size // 4
    for device in MESH.devices.flat:
        assert most[device.id] < parts[device.id] + largest + 2**12


def test_an_axis_without_a_mesh_is_refused(folder):
    with pytest.raises(ValueError, match="over is 'data', but names an axis of a mesh"):
        load_model(folder, over="data")


def test_weights_that_stream_to_all_devices_rest_in_one_pool(folder, monkeypatch):
    asked = []

    def ask(needed: int, platform: str) -> None:
        asked.append(needed)
        raise LookupError

    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 2**10)
    monkeypatch.setattr(streaming, "check_host_memory_limit", ask)
    auto = (jax.sharding.AxisType.Auto,) * 2
    square = jax.make_mesh((2, 2), ("rows", "data"), axis_types=auto)
    for placed in (
        {},
        {"mesh": MESH},
        {"mesh": MESH, "over": "data"},
        {"mesh": square, "over": "data"},
    ):
        with pytest.raises(LookupError):
            load_model(folder, stream_weights=True, **placed)
    alone, whole, cut, both = asked
    assert (whole, cut, both) == (4 * alone, alone, 2 * alone)


def test_an_adapter_goes_where_the_models_own_lay(folder, tmp_path):
    model = load_model(folder, lora=LORA, mesh=MESH, over="data")
    save_adapter(tmp_path, model, LORA, str(folder))
    before = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    load_adapter(tmp_path, model)
    for old, new in zip(before, jax.tree.leaves(nnx.state(model, nnx.LoRAParam)), strict=True):
        assert new.sharding == old.sharding
        np.testing.assert_array_equal(new, old)
