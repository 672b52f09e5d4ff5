import dataclasses
import gc
import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import (
    WeightFolder,
    cast,
    load_model,
    open_checkpoint,
    save_checkpoint,
    save_model,
)
from qlora_jax.checkpoints.save import model_checkpoint
from qlora_jax.models import Decoder, streaming
from qlora_jax.nn import FrozenParam, LoraConfig
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize
from tests.checkpoints.tiny import CONFIG, IDS, change_config, change_tensors, write_model
from tests.random_decoder import random_decoder

DENSE = {"quant": None, "lora": None, "compute_dtype": jnp.float32}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_model(folder)


@pytest.fixture
def folder(original, tmp_path):
    """A copy that may be damaged."""
    for path in original[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def same(first: Decoder, second: Decoder) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(first), nnx.state(second))


def test_saved_model_reads_back_bit_for_bit(original):
    folder, model = original
    same(load_model(folder, **DENSE), model)


@pytest.mark.parametrize("sizes", [("2KB", "5GB"), ("5GB", "2KB"), ("2KB", "40KB")])
def test_a_model_takes_the_place_of_another(sizes, original, tmp_path, monkeypatch):
    """Of other files too: nothing of an earlier model's shards or index is read, and what says
    which files there are comes last."""
    earlier = random_decoder(CONFIG, seed=1)
    moved, replace = [], Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: moved.append(self.suffix) or replace(self, to)
    )
    for model, size in zip((earlier, original[1]), sizes, strict=True):
        save_model(tmp_path, model, max_shard_size=size)
    same(load_model(tmp_path, **DENSE), original[1])
    moved.clear()
    save_model(tmp_path / "fresh", original[1], max_shard_size=sizes[1])
    assert ".safetensors" not in moved[moved.index(".json") :]
    left = {path.name for path in tmp_path.iterdir()} - {"fresh"}
    assert ("model.safetensors" in left) == (sizes[1] == "5GB")
    assert left == {path.name for path in (tmp_path / "fresh").iterdir()}


def test_tied_model_has_no_head_in_its_file(tmp_path):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    model = write_model(tmp_path, config)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").touch()  # beside safetensors none is looked at
    same(load_model(tmp_path, **DENSE), model)
    # Some writers store the tied head a second time.
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    same(load_model(tmp_path, **DENSE), model)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_tied_head_of_other_numbers_is_read(dtype, tmp_path):
    """As transformers 5 reads it; transformers 4 leaves it out."""
    model = write_model(tmp_path, dataclasses.replace(CONFIG, tie_word_embeddings=True))
    embedding = np.asarray(model.embed_tokens.weight[...])
    both = {"model.embed_tokens.weight": embedding.astype(dtype)}
    change_tensors(
        tmp_path, lambda t: t.update(both | {"lm_head.weight": -embedding.astype(dtype)})
    )
    assert open_checkpoint(tmp_path).config["tie_word_embeddings"] is False
    found = load_model(tmp_path, **DENSE)
    expected = -embedding.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found.lm_head.weight[...], expected)


def without_head(tensors: dict) -> None:
    """What transformers' `LlamaModel` saves: no name has its root, and there is no head."""
    tensors.pop("lm_head.weight", None)
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_a_folder_saved_without_its_head_loads_where_the_embedding_is_the_head(tmp_path):
    model = write_model(tmp_path, dataclasses.replace(CONFIG, tie_word_embeddings=True))
    change_tensors(tmp_path, without_head)
    same(load_model(tmp_path, **DENSE), model)
    # Written again, it has the names that a model with a head has.
    save_checkpoint(tmp_path / "again", open_checkpoint(tmp_path))
    assert "model.norm.weight" in load_file(tmp_path / "again" / "model.safetensors")
    # A head that lies beside such names is read.
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": 2 * t["embed_tokens.weight"]}))
    change_config(tmp_path, tie_word_embeddings=False)
    head = load_model(tmp_path, **DENSE).lm_head.weight[...]
    np.testing.assert_array_equal(head, 2 * model.embed_tokens.weight[...])


def test_a_folder_saved_without_its_head_is_refused_where_it_needs_one(folder):
    change_tensors(folder, without_head)
    with pytest.raises(ValueError, match=r"no 'lm_head.weight'.*AutoModelForCausalLM"):
        load_model(folder)


def test_sharded_folder_and_buffers_of_old_checkpoints(folder, original):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for index in range(3):
        shard = f"model-{index + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[index::3]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(load_model(folder, **DENSE), original[1])


@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig("int8", 32, False)])
def test_streamed_quantization_equals_quantizing_each_weight(original, quant):
    folder, dense = original
    model = load_model(folder, quant=quant, lora=None, compute_dtype=jnp.float32)
    kernel = model.layers.mlp.down_proj.kernel.get_value()
    assert isinstance(kernel, QuantizedTensor)
    for layer in range(CONFIG.num_hidden_layers):
        expected = quantize(dense.layers.mlp.down_proj.kernel.get_value()[layer], quant)
        for ours, theirs in zip(jax.tree.leaves(kernel), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours[layer], theirs)
    # What is not a layer's linear weight stays dense.
    np.testing.assert_array_equal(model.lm_head.weight[...], dense.lm_head.weight[...])


def test_one_tensor_at_a_time(original, monkeypatch):
    alive: list[weakref.ref] = []
    most = 0
    read = WeightFolder.read

    def watched(self, name):
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(WeightFolder, "read", watched)
    # What other tests left behind need not be looked through every time.
    gc.freeze()
    load_model(original[0], lora=None)
    gc.unfreeze()
    assert len(alive) == 3 + CONFIG.num_hidden_layers * (2 + 7 + 4)
    # JAX may still hold the last one on the CPU, where an array can share NumPy's memory.
    assert most <= 1


def test_adapters_are_drawn_from_the_seed(original):
    folder, _ = original
    lora = LoraConfig(r=4)
    first, again, other = (
        nnx.state(load_model(folder, lora=lora, seed=seed), nnx.LoRAParam) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    a, b = (s["layers"]["mlp"]["up_proj"]["lora_A"].get_value() for s in (first, other))
    assert bool((a != b).any())
    assert float(jnp.abs(a).max()) <= CONFIG.hidden_size**-0.5
    assert bool((a[0] != a[1]).any()), "every layer draws its own"
    assert not first["layers"]["mlp"]["up_proj"]["lora_B"].get_value().any()


def test_dtypes(original):
    folder, _ = original
    model = load_model(folder, lora=None, remat="dots", matmul="xla")
    assert (model.remat, model.layers.mlp.up_proj.implementation) == ("dots", "xla")
    # Norms are wider than the rest.
    assert model_checkpoint(model).config["torch_dtype"] == "float32"
    assert model.embed_tokens.weight.get_value().dtype == jnp.bfloat16
    assert model.layers.mlp.up_proj.kernel.get_value().dtype == jnp.bfloat16
    model = load_model(folder, quant=None, lora=None, trainable_base=True)
    assert model.compute_dtype == jnp.bfloat16
    params = nnx.state(model, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert not jax.tree.leaves(nnx.state(model, FrozenParam))
    # What is trained whole is no adapter.
    assert {info.dtype for info in model_checkpoint(model).tensors.values()} == {"F32"}


def test_16_bit_file(original, tmp_path):
    save_model(tmp_path, original[1], dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # As transformers 5 has it.
    newer = dataclasses.replace(open_checkpoint(tmp_path), config={"dtype": "bfloat16"})
    assert cast(newer, jnp.float16).config == {"dtype": "float16"}
    model = load_model(tmp_path, **DENSE)
    expected = original[1].embed_tokens.weight[...].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(model.embed_tokens.weight[...], expected)


NAME = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, model_type="rwkv"), "'rwkv', but only these"),
        (lambda f: change_config(f, intermediate_size=64), r"has shape \[.*calls for \[.*64"),
        (lambda f: change_config(f, num_hidden_layers=3), r"lacks the tensor 'model.layers.2"),
        (lambda f: change_config(f, num_hidden_layers=1), r"'model.layers.1.* no place for"),
        (lambda f: change_config(f, vocab_size=25), "tensor .* has shape"),
        (lambda f: change_tensors(f, lambda t: t.pop(NAME)), "lacks the tensor .*up_proj"),
        (lambda f: change_tensors(f, lambda t: t.update(extra=t[NAME])), "'extra'.*no place"),
        (
            lambda f: change_tensors(f, lambda t: t.update({NAME: t[NAME].astype(np.int8)})),
            "is stored as I8, but",
        ),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (lambda f: change_config(f, quantization_config={"quant_method": "gptq"}), "'gptq', but"),
    ],
)
def test_what_contradicts_the_config_is_refused_before_any_number_is_read(
    folder, damage, message, monkeypatch
):
    damage(folder)
    monkeypatch.setattr(WeightFolder, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (NAME, {}),
        (NAME, {"quant": QuantConfig("fp4", double_quant=False)}),
        (NAME, {"quant": QuantConfig("int8", blocksize=128)}),
        (NAME, {"stream_weights": True}),
        (EMBEDDING, {"embedding_bits": 8}),
    ],
)
def test_a_number_that_no_code_stands_for_is_refused(folder, name, options, number):
    def spoil(tensors):
        tensors[name][1, 2] = number

    change_tensors(folder, spoil)
    message = rf"^1 tensor\(s\) of .* hold NaN or infinities.*, {name} first: the file is damaged"
    with pytest.raises(ValueError, match=message):
        load_model(folder, **options)
    # Dense, it is nobody's but its own row's.
    assert not np.isfinite(load_model(folder, **DENSE)(IDS)).all()


def test_scales_of_packed_weights_are_to_be_finite(folder, tmp_path):
    packed = tmp_path / "packed"
    save_model(packed, load_model(folder, lora=None))

    def spoil(tensors):
        quantized = tensors[f"{NAME}.nested_absmax"]
        quantized[0] = np.nan

    change_tensors(packed, spoil)
    with pytest.raises(ValueError, match=f"hold NaN or infinities.*, {NAME} first"):
        load_model(packed)


def test_config_is_missing(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_model(folder)


def test_codes_cannot_be_trained(folder):
    with pytest.raises(ValueError, match="give quant=None"):
        load_model(folder, trainable_base=True)


def test_what_no_folder_can_hold_is_not_saved(original, tmp_path):
    folder, _ = original
    with pytest.raises(ValueError, match="'int8', for which bitsandbytes has no 4-bit format"):
        save_model(tmp_path, load_model(folder, quant=QuantConfig("int8"), lora=None))
    adapted = load_model(folder, quant=None, lora=LoraConfig(r=2, target_modules=("up_proj",)))
    with pytest.raises(ValueError, match="has adapters"):
        save_model(tmp_path, adapted)
    assert not list(tmp_path.iterdir())
    assert load_model(folder, quant=None)(IDS).shape == (2, 4, 24)


def test_weights_that_stream_are_read_straight_into_host_memory(original, monkeypatch):
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 256)
    folder, _ = original
    options = {"quant": QuantConfig(), "lora": None, "compute_dtype": jnp.float32}
    resident = load_model(folder, **options)
    streamed = load_model(folder, **options, stream_weights=True)
    assert streamed.stream_weights
    same(streamed, resident)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(nnx.state(streamed.layers))}
    assert "pinned_host" in kinds
    np.testing.assert_array_equal(jax.jit(streamed)(IDS), jax.jit(resident)(IDS))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("given", [{"quant": "nf4"}, {"lora": {"r": 8}}])
def test_what_is_no_configuration_is_named(tmp_path, given):
    with pytest.raises(TypeError, match=r"^(quant|lora) is .*Config or None is needed"):
        load_model(tmp_path, **given)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute_dtype": "bf16"}, "^compute_dtype is 'bf16', but float32, bfloat16 or"),
        ({"compute_dtype": jnp.float64}, "^compute_dtype is .*float64"),
        ({"param_dtype": "int8"}, "^param_dtype is 'int8'"),
        ({"matmul": "cuda"}, "^matmul is 'cuda', but one of xla, .*, or None, is needed"),
        ({"mesh": 8}, r"^mesh is 8, but .* is needed: make one .*jax.make_mesh\("),
        ({"seed": "a"}, "^seed is 'a', but a whole number from 0 to"),
        ({"seed": -1}, "^seed is -1, but a whole number from 0 to"),
        ({"overrides": {"nope": 1}}, "^overrides has 'nope', which is no field of .*: give some"),
        (
            {"trainable_base": True, "quant": None, "embedding_bits": 8},
            "together with embedding_bits=8, but codes cannot be trained",
        ),
    ],
)
def test_arguments_of_no_use_are_refused(folder, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_model(folder, **given)


def test_attention_is_chosen_for_what_will_be_read(original, monkeypatch):
    asked = []

    def choose(*given, **case):
        asked.append((given[1:], case))
        raise LookupError

    monkeypatch.setattr("qlora_jax.checkpoints.load.attention_for", choose)
    monkeypatch.setattr("qlora_jax.checkpoints.load.capability_here", lambda: (7, 5))
    capped = {"attn_logit_softcapping": 5.0, "alibi": True, "rope": None}
    with pytest.raises(LookupError):
        load_model(original[0], packed=True, longest=9, overrides=capped)
    case = {
        "softcap": 5.0,
        "bias": False,
        "alibi": True,
        "packed": True,
        "longest": 9,
        "compute_capability": (7, 5),
    }
    assert asked == [((jnp.bfloat16, CONFIG.head_dim), case)]


@pytest.mark.parametrize("given", [".", "adapter"])
def test_an_adapter_is_no_model(tmp_path, given):
    """Nor a run folder, with the run's config.json."""
    (tmp_path / "adapter").mkdir()
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no model: .*adapter is an adapter"):
        open_checkpoint(tmp_path / given)
