import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import (
    cast,
    dequantized,
    linear_weights,
    load_adapter,
    load_model,
    merge,
    merged,
    model_checkpoint,
    open_checkpoint,
    quantized,
    save_adapter,
    save_checkpoint,
    save_model,
)
from qlora_jax.checkpoints.adapter_file import TOKENS, WEIGHTS, token_indices
from qlora_jax.checkpoints.text_part import text_config, whole_lora
from qlora_jax.models import resize_token_embeddings, train_tokens
from qlora_jax.nn import LoraConfig, merge_lora
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize
from tests.checkpoints.tiny import CONFIG, IDS, change_config, write_model
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder

LORA = LoraConfig(r=4, alpha=8, target_modules=("q_proj", "down_proj"))
F32 = {"lora": None, "compute_dtype": jnp.float32}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base folder, an adapter folder with a B that is not zero, and the unmerged model."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    write_model(base)
    model = load_model(base, lora=LORA, compute_dtype=jnp.float32)
    nnx.update(model, jax.tree.map(lambda x: x + 0.02, nnx.state(model, nnx.LoRAParam)))
    save_adapter(adapter, model, LORA, "base")
    return base, adapter, model


def test_dequantized_merge_is_the_unmerged_model(trained):
    base, adapter, model = trained
    checkpoint = merge(open_checkpoint(base), adapter, "dequantized")
    assert checkpoint.quant is None
    dense = load_model(checkpoint, quant=None, **F32)
    np.testing.assert_allclose(dense(IDS), model(IDS), rtol=0, atol=2e-6)


def test_a_model_merged_in_memory_is_written_as_the_merged_checkpoint(trained, tmp_path):
    base, adapter, model = trained
    expected = merge(open_checkpoint(base), adapter, "dequantized")
    model = nnx.clone(model)
    with pytest.raises(ValueError, match=r"merge them \(ql\.merge_lora\(model\)\)"):
        save_model(tmp_path / "out", model)
    # Layers without an adapter are packed still, and written so: all dense here.
    model = merge_lora(model)
    read = dequantized(model_checkpoint(model)).read
    for name in expected.tensors:
        np.testing.assert_allclose(read(name), expected.read(name), rtol=0, atol=1e-6)


def test_original_merge_against_float64(trained):
    base, adapter, _ = trained
    checkpoint = merge(open_checkpoint(base), adapter, "original")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.astype(np.float64)
        if f"{prefix}.lora_A.weight" in tensors:
            a, b = (tensors[f"{prefix}.lora_{x}.weight"].astype(np.float64) for x in "AB")
            expected = expected + 2.0 * (b @ a)
        np.testing.assert_allclose(checkpoint.read(name), expected, rtol=0, atol=1e-6)


def test_requantized_merge_is_nf4_again_and_written_as_such(trained, tmp_path):
    base, adapter, model = trained
    checkpoint = merge(open_checkpoint(base), adapter, "requantized")
    assert checkpoint.quant == QuantConfig()
    save_checkpoint(tmp_path / "out", checkpoint)
    again = load_model(tmp_path / "out", **F32)
    assert isinstance(again.layers.mlp.down_proj.kernel.get_value(), QuantizedTensor)
    # As far from the trained model as four bits are from the merged weights, and no further.
    assert 1e-3 < float(jnp.abs(again(IDS) - model(IDS)).max()) < 0.2


def test_requantizing_a_16_bit_base_rounds_once(trained):
    """To four bits: not to the base's 16 on the way, which is what the codes stand for all the
    same."""
    base, adapter, _ = trained
    narrow = cast(open_checkpoint(base), "bfloat16")
    checkpoint = merge(narrow, adapter, "requantized")
    name = "model.layers.1.self_attn.q_proj.weight"
    own = quantize(narrow.read(name), QuantConfig())
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name[:-7]}.lora_{x}.weight"] for x in "AB")
    expected = quantize(np.asarray(own.dequantize(jnp.float32)) + 2 * (b @ a), QuantConfig())
    found = checkpoint.read(name)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.absmax, expected.absmax)
    assert (checkpoint.tensors[name].dtype, found.dtype) == ("BF16", jnp.bfloat16)
    assert dequantized(checkpoint).read(name).dtype == jnp.bfloat16


def test_requantizing_an_untouched_weight_loses_nothing(trained):
    base, adapter, model = trained
    checkpoint = merge(open_checkpoint(base), adapter, "requantized")
    name = "model.layers.1.mlp.up_proj.weight"
    kernel = jax.tree.map(lambda x: x[1], model.layers.mlp.up_proj.kernel.get_value())
    np.testing.assert_array_equal(checkpoint.read(name).codes, kernel.codes)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_folder_is_no_checkpoint():
    with pytest.raises(TypeError, match=r"^base is 'base', but .* give open_checkpoint\(folder\)"):
        merge("base", "adapter", "dequantized")
    with pytest.raises(TypeError, match=r"^checkpoint is 'base', but .* give open_checkpoint"):
        merged("base", "adapter")
    with pytest.raises(TypeError, match=r"^checkpoint is 'base', but"):
        save_checkpoint("out", "base")


@pytest.mark.usefixtures("as_users_run_it")
def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"^model is a str, but only the models of load_pretrained"):
        save_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), str(tmp_path))


def test_modes_of_a_folder_in_4_bits(trained, tmp_path):
    base, adapter, _ = trained
    save_checkpoint(tmp_path / "packed", merge(open_checkpoint(base), adapter, "requantized"))
    packed = open_checkpoint(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"is quantized, .* give their folder, or the mode"):
        merge(packed, adapter, "original")
    with pytest.raises(ValueError, match="choose one of original, dequantized, requantized"):
        merge(packed, adapter, "fp16")
    dense = merge(packed, adapter, "dequantized")
    assert dense.quant is None
    assert "quantization_config" not in dense.config


PISSA = LoraConfig(r=4, alpha=8, target_modules=("up_proj",), init_lora_weights="pissa")
LOFTQ = dataclasses.replace(PISSA, init_lora_weights="loftq", loftq_iter=2)


@pytest.mark.parametrize(
    ("lora", "quant", "mode"),
    [
        (PISSA, QuantConfig(), "dequantized"),
        (LOFTQ, QuantConfig(), "dequantized"),
        (PISSA, None, "original"),
    ],
    ids=["pissa", "loftq", "pissa-16-bit"],
)
def test_a_start_that_took_from_the_base_is_taken_from_it_again(
    lora, quant, mode, trained, tmp_path
):
    base = open_checkpoint(trained[0])
    model = load_model(base, lora=lora, quant=quant, compute_dtype=jnp.float32)
    nnx.update(model, jax.tree.map(lambda x: x + 0.02, nnx.state(model, nnx.LoRAParam)))
    save_adapter(tmp_path, model, lora, "base")
    dense = load_model(merge(base, tmp_path, mode), quant=None, **F32)
    np.testing.assert_allclose(dense(IDS), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [PISSA, LOFTQ], ids=["pissa", "loftq"])
def test_a_start_that_cannot_be_repeated_is_refused(lora, trained, tmp_path):
    base, adapter = open_checkpoint(trained[0]), tmp_path / "adapter"
    save_adapter(adapter, load_model(base, lora=lora), lora, "base")
    save_checkpoint(tmp_path / "packed", quantized(base, linear_weights(base), QuantConfig()))
    packed = open_checkpoint(tmp_path / "packed")
    for mode in ("dequantized", "original"):
        with pytest.raises(ValueError, match=r"is quantized, as .*: give the 16-bit folder"):
            merge(packed, adapter, mode)
    if lora is LOFTQ:
        with pytest.raises(ValueError, match="merge with the mode 'dequantized'"):
            merge(base, adapter, "original")


def change_adapter(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def copied(trained, tmp_path):
    for path in trained[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return trained[0], tmp_path


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
K = A.replace("q_proj", "k_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({A: np.ones((4, 16), np.float32)}), r"as \[32, 16\], but .* another"),
        (lambda t: t.update({A.replace(".0.", ".7."): t[A]}), "layers.7.*does not have: .*another"),
        (lambda t: t.pop(A), "holds only B of"),
        (
            lambda t: t.update({K: t[A], K.replace("_A", "_B"): np.ones((16, 4), np.float32)}),
            "adapts '.*k_proj.weight', which its adapter_config.json does not target",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": np.ones(48, np.float32)}),
            r"replaces 'model.norm.weight' by \[48\], but in .* it is \[32\]: .* another base",
        ),
        (lambda t: (t.pop(A), t.pop(B)), r"lacks the adapter of '.*0\.self_attn\.q_proj.* targets"),
    ],
)
def test_adapter_of_another_base_is_refused_before_a_weight_is_read(copied, change, message):
    base, adapter = copied
    change_adapter(adapter, change)
    with pytest.raises(ValueError, match=message) as error:
        merged(open_checkpoint(base), adapter)
    assert "\n" not in str(error.value)


def test_a_tokenizer_beside_an_adapter_that_has_trained_no_tokens_is_left_there(copied):
    base, adapter = copied
    (adapter / "tokenizer.json").write_text("the base's own, perhaps with a token too many")
    assert "tokenizer.json" not in merged(open_checkpoint(base), adapter).companions()


def test_damaged_adapter(copied):
    base, adapter = copied
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is truncated or no safetensors"):
        merged(open_checkpoint(base), adapter)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors"):
        merged(open_checkpoint(base), adapter)


def test_a_row_of_zeros_has_no_direction_for_doras_magnitude(copied):
    base, adapter = open_checkpoint(copied[0]), copied[1]

    def with_magnitudes(tensors):
        tensors[B] = np.concatenate([np.zeros((1, 4), np.float32), tensors[B][1:]])
        for name in [name for name in tensors if name.endswith("B.weight")]:
            rows = np.ones(len(tensors[name]), np.float32)
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = rows

    change_adapter(adapter, with_magnitudes)
    change_config(adapter, file="adapter_config.json", use_dora=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = np.array(base.read(name))
    rows[0] = 0
    zeroed = dataclasses.replace(base, read=lambda n: rows if n == name else base.read(n))
    lengths = np.linalg.norm(merged(zeroed, adapter).read(name), axis=1)
    np.testing.assert_allclose(lengths, [0, *[1] * 31], atol=1e-6)


def test_whole_modules_take_the_place_of_the_bases(copied):
    base, adapter = copied
    rows = np.arange((CONFIG.vocab_size + 2) * CONFIG.hidden_size, dtype=np.float32)
    rows = rows.reshape(-1, CONFIG.hidden_size)
    whole = {
        "base_model.model.model.embed_tokens.weight": rows,
        "base_model.model.lm_head.weight": rows,
    }
    change_adapter(adapter, lambda t: t.update(whole))
    checkpoint = merged(open_checkpoint(base), adapter)
    assert checkpoint.config["vocab_size"] == CONFIG.vocab_size + 2
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), rows)
    assert load_model(checkpoint, quant=None, **F32)(IDS).shape == (2, 4, CONFIG.vocab_size + 2)


def test_a_tied_head_that_was_trained_apart_is_untied(copied, tmp_path_factory):
    _, adapter = copied
    base = tmp_path_factory.mktemp("tied")
    write_model(base, dataclasses.replace(CONFIG, tie_word_embeddings=True))
    head = np.ones((CONFIG.vocab_size, CONFIG.hidden_size), np.float32)
    change_adapter(adapter, lambda t: t.update({"base_model.model.lm_head.weight": head}))
    checkpoint = merged(open_checkpoint(base), adapter)
    assert not checkpoint.config["tie_word_embeddings"]
    model = load_model(checkpoint, quant=None, **F32)
    np.testing.assert_array_equal(model.lm_head.weight[...], head)


def test_a_head_that_is_tied_without_a_word_is_untied_too(tmp_path):
    """A published Gemma's config.json leaves it to its family."""
    config = dataclasses.replace(VARIANTS["gemma2-plain"], tie_word_embeddings=True)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_model(base, config)
    fields = json.loads((base / "config.json").read_text())
    del fields["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(fields))
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    save_adapter(adapter, load_model(base, lora=lora), lora, "base")
    head = np.ones((config.vocab_size, config.hidden_size), np.float32)
    change_adapter(adapter, lambda t: t.update({"base_model.model.lm_head.weight": head}))
    checkpoint = merged(open_checkpoint(base), adapter)
    assert checkpoint.config["tie_word_embeddings"] is False
    model = load_model(checkpoint, quant=None, **F32)
    np.testing.assert_array_equal(model.lm_head.weight[...], head)


def seeing_gemma(text, seeing):
    """Folders of a Gemma 3, and of one that sees and has it as its text part; the eye's tensors."""
    write_model(text, VARIANTS["gemma3_text-scaled"])
    config = json.loads((text / "config.json").read_text())
    seeing.mkdir()
    whole = {"model_type": "gemma3", "text_config": config}
    (seeing / "config.json").write_text(json.dumps(whole))
    tensors = load_file(text / "model.safetensors")
    eye = {"vision_tower.x": np.ones((2, 2), np.float32)}
    named = {f"language_model.{name}": value for name, value in tensors.items()}
    save_file(eye | named, seeing / "model.safetensors")
    return eye


@pytest.mark.parametrize("start", [True, "loftq"])
def test_layers_of_a_gemma_that_sees_are_called_as_in_its_text(start, tmp_path):
    seeing_gemma(tmp_path / "text", tmp_path / "seeing")
    lora = LoraConfig(
        r=2, target_modules=r"model\.layers\.[01]\.self_attn\.q_proj", init_lora_weights=start,
        rank_pattern={"model.layers.1.self_attn.q_proj": 1},
    )  # fmt: skip
    models = [load_model(tmp_path / name, lora=lora) for name in ("text", "seeing")]
    states = [nnx.state(model, nnx.LoRAParam) for model in models]
    assert jax.tree.leaves(states[0])
    jax.tree.map(np.testing.assert_array_equal, *states)
    save_adapter(tmp_path / "adapter", models[1], lora, "seeing")
    load_adapter(tmp_path / "adapter", models[0])


@pytest.mark.parametrize("saved", [None, ("norm",), ("embed_tokens",)])
def test_an_adapter_of_a_gemma_that_sees_is_one_of_its_text(saved, tmp_path):
    """It has the names that PEFT meets in the seeing model, is merged into that one and into its
    text part, and so is one with the text's names."""
    text, seeing, adapter = (tmp_path / name for name in ("text", "seeing", "adapter"))
    eye = seeing_gemma(text, seeing)
    lora = LoraConfig(r=2, target_modules=("q_proj", "up_proj"), modules_to_save=saved)
    model = load_model(seeing, quant=None, lora=lora)
    nnx.update(model, jax.tree.map(lambda x: x + 0.02, nnx.state(model, nnx.LoRAParam)))
    save_adapter(adapter, model, lora, "seeing")
    inside = "base_model.model.model.language_model."
    others = [key for key in load_file(adapter / WEIGHTS) if not key.startswith(inside)]
    assert others == ["base_model.model.lm_head.weight"] * (saved == ("embed_tokens",))
    of_text = load_model(text, quant=None, lora=lora)
    load_adapter(adapter, of_text)
    save_adapter(tmp_path / "of-text", of_text, lora, "text")
    assert not any("language" in k for k in load_file(tmp_path / "of-text" / WEIGHTS))
    expected = merge(open_checkpoint(text), adapter, "original")
    found = merge(open_checkpoint(seeing), adapter, "original")
    same = merge(open_checkpoint(seeing), tmp_path / "of-text", "original")
    names = {f"language_model.{name}" for name in expected.tensors}
    assert set(found.tensors) == names | eye.keys()
    for name in expected.tensors:
        np.testing.assert_array_equal(found.read(f"language_model.{name}"), expected.read(name))
        np.testing.assert_array_equal(same.read(f"language_model.{name}"), expected.read(name))


def test_what_an_adapter_says_in_the_names_of_the_larger_model():
    lora = LoraConfig(
        r=4, alpha=8, target_modules=("q_proj", "k_proj"), modules_to_save=("model.norm",),
        rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\.self_attn\.k_proj": 3},
    )  # fmt: skip
    modules = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qk"]
    whole = whole_lora(lora, modules)
    for module in modules:
        own, theirs = lora.at(module), whole.at(module.replace("model.", "model.language_model."))
        assert (own.r, own.alpha) == (theirs.r, theirs.alpha)
    assert whole.at("model.vision_tower.encoder.layers.0.self_attn.q_proj") is None
    assert whole.modules_to_save == ("model.language_model.norm",)
    for part in ("model.language_model", "language_model.model"):
        said = text_config({"trainable_token_indices": {f"{part}.embed_tokens": [3]}})
        rows = [f"base_model.model.{part}.embed_tokens.{TOKENS}"]
        assert token_indices(said, rows) == {"model.embed_tokens": (3,)}
        layer = "layers.0.mlp.up_proj"
        for field in ("rank_pattern", "alpha_pattern"):
            said = text_config({field: {f"{part}.{layer}": 2}})
            assert said == {field: {f"model.{layer}": 2}}
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            assert text_config({field: [f"{part}.{layer}"]}) == {field: [f"model.{layer}"]}


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_lies_beside_the_head_itself(copied, tied, tmp_path_factory):
    """PEFT saves a head that has an adapter whole as well: what A and B were trained on."""
    _, adapter = copied
    base = tmp_path_factory.mktemp("headed")
    write_model(base, dataclasses.replace(CONFIG, tie_word_embeddings=tied))
    rng = np.random.default_rng(0)
    shapes = {
        "base_layer.weight": (CONFIG.vocab_size + 1, CONFIG.hidden_size),
        "lora_A.weight": (4, CONFIG.hidden_size),
        "lora_B.weight": (CONFIG.vocab_size + 1, 4),
    }
    head = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    prefix = "base_model.model.lm_head."
    change_adapter(adapter, lambda t: t.update({prefix + name: x for name, x in head.items()}))
    targets = [*LORA.target_modules, "lm_head"]
    change_config(adapter, file="adapter_config.json", target_modules=targets)
    merged_head = merged(open_checkpoint(base), adapter).read("lm_head.weight")
    expected = head["base_layer.weight"] + LORA.scaling * (
        head["lora_B.weight"] @ head["lora_A.weight"]
    )
    np.testing.assert_allclose(merged_head, expected, rtol=0, atol=1e-5)
    model = load_model(base, quant=None, lora=LORA, compute_dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"adapter of 'lm_head', but .*qlora-jax merge"):
        load_adapter(adapter, model)


def test_an_embeddings_adapter_is_refused_as_such(copied):
    base, adapter = copied
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    change_adapter(adapter, lambda t: t.update({name: np.ones((4, 8), np.float32)}))
    with pytest.raises(ValueError, match="lora_embedding_A', but adapters of linear layers alone"):
        merged(open_checkpoint(base), adapter)


@pytest.mark.parametrize("mode", ["dequantized", "original"])
def test_trained_token_rows_are_merged_and_new_ones_grow_the_vocabulary(tmp_path, mode):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    write_model(base)
    quant = QuantConfig() if mode == "dequantized" else None
    model = load_model(base, quant=quant, lora=LORA, compute_dtype=jnp.float32)
    size = CONFIG.vocab_size
    resize_token_embeddings(model, size + 2)
    train_tokens(model, [3, size, size + 1])
    nnx.update(model, jax.tree.map(lambda x: x + 0.02, nnx.state(model, nnx.LoRAParam)))
    save_adapter(adapter, model, LORA, "base")
    save_checkpoint(out, merge(open_checkpoint(base), adapter, mode))
    again = load_model(out, quant=None, **F32)
    ids = IDS.at[0, :3].set(jnp.asarray([3, size, size + 1]))
    assert again(ids).shape[-1] == size + 2
    np.testing.assert_allclose(again(ids), model(ids), rtol=0, atol=3e-6)
    # The tokens' texts are the adapter's to say.
    for folder, names in {
        base: ("tokenizer.model", "tokenizer_config.json", "generation_config.json"),
        adapter: ("tokenizer.json", "tokenizer_config.json"),
    }.items():
        for file in names:
            (folder / file).write_text(folder.name)
    texts = merge(open_checkpoint(base), adapter, mode).companions()
    ours = dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), b"adapter")
    assert texts == {"generation_config.json": b"base"} | ours
    # As PEFT's users name them: by the end of the module's name.
    ends = {"embed_tokens": [3, size, size + 1], "lm_head": [3, size, size + 1]}
    change_config(adapter, file="adapter_config.json", trainable_token_indices=ends)
    short = merge(open_checkpoint(base), adapter, mode)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(short.read(name), open_checkpoint(out).read(name))
    change_config(adapter, file="adapter_config.json", trainable_token_indices={"lm_head": [3]})
    with pytest.raises(ValueError, match=r"holds 3 rows of trained tokens of .* names [01]: fetch"):
        merge(open_checkpoint(base), adapter, mode)


def test_a_head_of_another_name_grows_with_the_embedding(tmp_path):
    """GPT-NeoX's `embed_out`, none of whose rows are trained."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    config = VARIANTS["gpt_neox-serial"]
    save_model(base, random_decoder(config))
    lora = LoraConfig(r=2, target_modules=("query_key_value",))
    model = load_model(base, quant=None, lora=lora, compute_dtype=jnp.float32)
    size = config.vocab_size
    resize_token_embeddings(model, size + 1)
    train_tokens(model, [size])
    save_adapter(adapter, model, lora, "base")
    change_adapter(
        adapter, lambda t: t.pop("base_model.model.embed_out.token_adapter.trainable_tokens_delta")
    )
    change_config(
        adapter, file="adapter_config.json", trainable_token_indices={"gpt_neox.embed_in": [size]}
    )
    save_checkpoint(out, merge(open_checkpoint(base), adapter, "original"))
    ids = IDS.at[0, 0].set(size)
    np.testing.assert_allclose(
        load_model(out, quant=None, **F32)(ids), model(ids), rtol=0, atol=3e-6
    )
