"""Adapters of every kind, out of a model and into another: the same bits, the same logits."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qlora_jax as ql
from qlora_jax.checkpoints import (
    adapter_file,
    check_adapter,
    load_adapter,
    load_model,
    merge,
    open_checkpoint,
    read_adapter_config,
    save_adapter,
    save_model,
)
from qlora_jax.checkpoints.adapter import _targets
from qlora_jax.checkpoints.adapter_config import config_from_json, config_to_json
from qlora_jax.checkpoints.matching import node_at
from qlora_jax.models import (
    FAMILIES,
    Decoder,
    EncoderClassifier,
    EncoderConfig,
    module_names,
    train_tokens,
)
from qlora_jax.nn import LoraConfig, TrainedParam, add_lora, settle_adapters
from tests.checkpoints.tiny import CONFIG, IDS, change_config, change_tensors, write_model
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder
from tests.shared import shared_path

PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def dense() -> Decoder:
    """The base in memory, to be copied: cheaper than loading it for each case."""
    return random_decoder(CONFIG)


def adapted(dense: Decoder, lora: LoraConfig, seed: int = 0) -> Decoder:
    """As `load_model` adapts."""
    names = module_names(FAMILIES["llama"].weight_names(CONFIG))
    return add_lora(nnx.clone(dense), lora, rngs=nnx.Rngs(seed), names=names)


def trained(model: Decoder) -> Decoder:
    """All that is trained, moved by two steps along the gradient's signs."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def step(lora, rest):
        def loss(lora):
            return jnp.sum(jnp.sin(7 * nnx.merge(graphdef, lora, rest)(IDS)))

        return jax.tree.map(lambda p, g: p + 0.05 * jnp.sign(g), lora, jax.grad(loss)(lora))

    return nnx.merge(graphdef, step(step(lora, rest), rest), rest)


@nnx.jit
def logits(model: Decoder) -> jax.Array:
    return model(IDS)


KINDS = {
    "patterns": LoraConfig(
        r=4,
        alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={r"layers\.0\..*down_proj": 2},
    ),
    "one layer": LoraConfig(r=2, target_modules=("v_proj",), layers_to_transform=(1,)),
    "expression": LoraConfig(r=2, target_modules=r"model\.layers\.0\.(mlp|self_attn)\.[qud].*"),
    "exclude": LoraConfig(r=2, exclude_modules=("q_proj", "layers.0.mlp.up_proj")),
    "dora": LoraConfig(
        r=2, use_dora=True, use_rslora=True, exclude_modules=(r"layers.0.mlp.up_proj",)
    ),
    "biases": LoraConfig(r=2, target_modules=("q_proj",), bias="lora_only"),
    "all biases": LoraConfig(r=2, target_modules=("q_proj",), bias="all"),
    "saved": LoraConfig(r=2, modules_to_save=("embed_tokens", "lm_head", "model.norm")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, dense: Decoder, tmp_path: Path) -> None:
    lora = KINDS[kind]
    model = trained(adapted(dense, lora))
    save_adapter(tmp_path, model, lora, "base")
    fresh = adapted(dense, read_adapter_config(tmp_path), seed=1)
    load_adapter(tmp_path, fresh)
    np.testing.assert_array_equal(logits(model), logits(fresh))
    assert float(jnp.abs(logits(model) - logits(dense)).max()) > 1e-3
    once = load_file(tmp_path / "adapter_model.safetensors")
    save_adapter(tmp_path, fresh, lora, "base")
    again = load_file(tmp_path / "adapter_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, once, again)


@pytest.mark.parametrize(
    "lora",
    [
        *KINDS.values(),
        LoraConfig(lora_dropout=0.1, layers_to_transform=(0, 2), layers_pattern=("h", "layers")),
        LoraConfig(target_modules=("q",), init_lora_weights="loftq", loftq_iter=3),
        LoraConfig(target_modules=("q",), init_lora_weights="pissa"),
    ],
)
def test_a_configuration_is_read_as_it_was_written(lora: LoraConfig) -> None:
    config = config_to_json(
        lora, base_name="base", targets=lora.target_modules, task_type="CAUSAL_LM"
    )
    written = json.loads(json.dumps(config))
    assert config_from_json(written, Path("adapter_config.json")) == lora


def test_a_start_that_leaves_the_base_alone_is_not_told_to_peft() -> None:
    """Which would quantize the base and start again, wherever it loads the adapter."""
    for start in ("gaussian", "loftq"):
        lora = LoraConfig(init_lora_weights=start)
        config = config_to_json(lora, base_name="", targets=("q",), task_type="CAUSAL_LM")
        assert config["init_lora_weights"] is True


def test_other_ways_to_write_a_configuration() -> None:
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "ALL-LINEAR"}
    read = config_from_json(given | {"layers_to_transform": 1}, Path("adapter_config.json"))
    assert read == LoraConfig(r=2, alpha=4, layers_to_transform=(1,))


def test_a_settled_dora_model_is_refused(dense: Decoder, tmp_path: Path) -> None:
    """At a scale of 1 its factors would pass for magnitudes."""
    lora = LoraConfig(r=2, alpha=2, use_dora=True, target_modules=("q_proj",))
    save_adapter(tmp_path, adapted(dense, lora), lora, "base")
    settled = settle_adapters(adapted(dense, lora))
    with pytest.raises(ValueError, match=r"was settled for writing .* save before that"):
        save_adapter(tmp_path, settled, lora, "base")
    with pytest.raises(ValueError, match="load into a model as built"):
        load_adapter(tmp_path, settled)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_norms_are_no_adapted_layers(bias: str, tmp_path: Path) -> None:
    config = VARIANTS["gpt_neox-serial"]
    names = module_names(FAMILIES["gpt_neox"].weight_names(config))
    lora = LoraConfig(r=2, bias=bias)
    model = add_lora(random_decoder(config), lora, rngs=nnx.Rngs(0), names=names)
    save_adapter(tmp_path, model, lora, "base")
    norms = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "norm" in name]
    assert bool(norms) is (bias == "all")


def test_rows_of_a_head_that_transformers_calls_otherwise_are_refused(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=("query_key_value",))
    model = random_decoder(VARIANTS["gpt_neox-serial"], lora=lora)
    train_tokens(model, [3, 5])
    save_adapter(tmp_path, model, lora, "base")
    written = tmp_path / "adapter_config.json"
    written.write_text(written.read_text().replace('"embed_out"', '"lm_head"'))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    rows = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    tensors[rows.format("lm_head")] = tensors.pop(rows.format("embed_out"))
    save_file(tensors, weights)
    words = r"trained rows of 'lm_head', as transformers 5 .*whole"
    with pytest.raises(ValueError, match=words):
        load_adapter(tmp_path, model)
    save_model(tmp_path / "base", random_decoder(VARIANTS["gpt_neox-serial"]))
    with pytest.raises(ValueError, match=words):
        merge(open_checkpoint(tmp_path / "base"), tmp_path, "original")


def _t5_with_a_head(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(shared_path("vectors/models/t5_v1_1"), folder)
    change_config(folder, tie_word_embeddings=False)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["shared.weight"] + 1}))
    return folder


def test_rows_of_t5s_embedding_that_may_be_its_heads_are_refused(tmp_path: Path) -> None:
    base = _t5_with_a_head(tmp_path)
    lora = LoraConfig(r=2, target_modules=("q",))
    model = load_model(base, quant=None, lora=lora)
    train_tokens(model, [3, 5])
    save_adapter(tmp_path, model, lora, "base")
    load_adapter(tmp_path, model)  # it has the head's own beside them
    weights = tmp_path / "adapter_model.safetensors"
    rows = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    tensors = load_file(weights)
    del tensors[rows]
    save_file(tensors, weights)
    change_config(tmp_path, file="adapter_config.json", trainable_token_indices={"shared": [3, 5]})
    words = "trained rows of 'shared', which PEFT takes for rows of 'lm_head' as well"
    with pytest.raises(ValueError, match=words):
        load_adapter(tmp_path, model)
    with pytest.raises(ValueError, match=words):
        merge(open_checkpoint(base), tmp_path, "original")


def test_biases_that_peft_saves_thrice_are_read_once(tmp_path: Path) -> None:
    config = VARIANTS["gpt_neox-serial"]
    names = module_names(FAMILIES["gpt_neox"].weight_names(config))
    lora = LoraConfig(r=2, bias="all", modules_to_save=("final_layer_norm",))
    model = add_lora(random_decoder(config), lora, rngs=nnx.Rngs(0), names=names)
    save_adapter(tmp_path, model, lora, "base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    ours = [name for name in tensors if "final_layer_norm.bias" in name]
    for name in ours:
        module = name.removesuffix("bias")
        tensors[f"{module}modules_to_save.bias"] = tensors[name]
        tensors[f"{module}original_module.bias"] = tensors[name] + 1
    save_file(tensors, file)
    load_adapter(tmp_path, model)
    save_adapter(tmp_path, model, lora, "base")
    again = load_file(file)
    assert set(tensors) - set(again) == {
        name.replace("bias", f"{copy}.bias")
        for name in ours
        for copy in ("modules_to_save", "original_module")
    }
    assert len(ours) == 1
    np.testing.assert_array_equal(again[ours[0]], tensors[ours[0]])


def test_biases_that_peft_saves_thrice_inside_of_a_copy(tmp_path: Path) -> None:
    """A classifier's head is a module of two layers: the adapter's name stands in theirs."""
    base = tmp_path / "base"
    save_model(base, EncoderClassifier(EncoderConfig(8, 8, 8, 1, 1), rngs=nnx.Rngs(0)))
    lora = LoraConfig(r=2, bias="all", target_modules=("query",))
    model = load_model(base, quant=None, lora=lora, compute_dtype=jnp.float32)
    save_adapter(tmp_path, model, lora, "base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    head = "base_model.model.classifier"
    for layer in ("dense", "out_proj"):
        tensors[f"{head}.{layer}.bias"] += 1
        bias = tensors[f"{head}.{layer}.bias"]
        tensors[f"{head}.modules_to_save.default.{layer}.bias"] = bias
        tensors[f"{head}.original_module.{layer}.bias"] = bias + 1
    save_file(tensors, file)
    load_adapter(tmp_path, model)
    expected = tensors[f"{head}.dense.bias"]
    np.testing.assert_array_equal(model.classifier.dense.bias[...], expected)
    merged = merge(open_checkpoint(base), tmp_path, "original").read("classifier.dense.bias")
    np.testing.assert_array_equal(merged, expected.astype(merged.dtype))


def names_of(dense: Decoder, folder: Path, lora: LoraConfig) -> dict[str, np.ndarray]:
    save_adapter(folder, adapted(dense, lora), lora, "base")
    return load_file(folder / "adapter_model.safetensors")


def test_ranks_in_the_file_are_each_layers_own(dense: Decoder, tmp_path: Path) -> None:
    tensors = names_of(dense, tmp_path, KINDS["patterns"])
    shapes = {name: tensors[f"{PREFIX}.{name}.weight"].shape for name in (
        "0.self_attn.q_proj.lora_A", "0.mlp.up_proj.lora_A", "1.mlp.up_proj.lora_A",
        "1.mlp.up_proj.lora_B",
    )}  # fmt: skip
    assert list(shapes.values()) == [(2, 32), (4, 32), (3, 32), (48, 3)]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}


def test_names_in_the_file_are_pefts(dense: Decoder, tmp_path: Path) -> None:
    dora = names_of(dense, tmp_path / "dora", KINDS["dora"])
    magnitude = f"{PREFIX}.1.mlp.up_proj.lora_magnitude_vector"
    # The name that it has inside of PEFT since 0.11.
    older = {f"{n}.weight" if n.endswith("vector") else n: x for n, x in dora.items()}
    save_file(older, tmp_path / "dora" / "adapter_model.safetensors")
    again = adapted(dense, KINDS["dora"])
    load_adapter(tmp_path / "dora", again)
    found = again.layers.mlp.up_proj.lora_magnitude_vector[...][1]
    np.testing.assert_array_equal(found, dora[magnitude])
    assert not any("layers.0.mlp.up_proj" in name for name in dora)
    biases = names_of(dense, tmp_path / "biases", KINDS["all biases"])
    assert f"{PREFIX}.0.self_attn.q_proj.base_layer.bias" in biases
    assert f"{PREFIX}.0.self_attn.k_proj.bias" in biases
    saved = names_of(dense, tmp_path / "saved", KINDS["saved"])
    whole = {name for name in saved if "lora_" not in name}
    assert whole == {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.norm.weight",
    }


def test_all_linear_of_a_classifier_leaves_its_head_out() -> None:
    """Whose layer is called as others below it: a last name alone would mean it, too."""
    config, lora = EncoderConfig(8, 8, 8, 1, 1), LoraConfig(r=2)
    model = nnx.eval_shape(lambda: EncoderClassifier(config, lora=lora, rngs=nnx.Rngs(0)))
    layer = "roberta.encoder.layer.0"
    assert set(_targets(model, lora)) == {
        *(f"{layer}.attention.self.{name}" for name in ("query", "key", "value")),
        *(f"{layer}.{name}.dense" for name in ("attention.output", "intermediate", "output")),
    }


def test_all_linear_is_written_by_name(dense: Decoder, tmp_path: Path) -> None:
    names_of(dense, tmp_path, LoraConfig(r=2))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("rounds", [1, 2])
def test_loftq_is_made_while_loading(rounds: int, base: Path, tmp_path: Path) -> None:
    """The same base comes again from the adapter's own configuration, and with it the logits."""
    lora = LoraConfig(
        r=8,
        init_lora_weights="loftq",
        loftq_iter=rounds,
        target_modules=("up_proj",),
        use_dora=rounds == 2,
    )
    quant = ql.QuantConfig(double_quant=False)
    start = load_model(base, lora=lora, quant=quant, compute_dtype=jnp.float32)
    up = start.layers.mlp.up_proj
    original = load_file(base / "model.safetensors")
    for layer in range(CONFIG.num_hidden_layers):
        weight = original[f"model.layers.{layer}.mlp.up_proj.weight"]
        plain = ql.quantize(weight, quant).dequantize()
        codes = up.kernel.get_value().dequantize()[layer]
        assert bool((codes == plain).all()) is (rounds == 1)
        low = lora.scaling * up.lora_B[...][layer] @ up.lora_A[...][layer]
        error, before = (np.linalg.norm(weight - x) for x in (codes + low, plain))
        assert error < 0.8 * before
        if lora.use_dora:
            # Training starts from W + s·B·A, so the magnitudes are its rows' lengths.
            lengths = np.linalg.norm(np.float64(codes + low), axis=1)
            np.testing.assert_allclose(up.lora_magnitude_vector[...][layer], lengths, rtol=1e-5)
    save_adapter(tmp_path, start, lora, "base")
    read = read_adapter_config(tmp_path)
    again = load_model(base, lora=read, quant=quant, compute_dtype=jnp.float32)
    load_adapter(tmp_path, again)
    np.testing.assert_array_equal(logits(again), logits(start))


def test_pissa_is_made_while_loading(base: Path, tmp_path: Path) -> None:
    """On a quantized base: the codes of what NumPy's SVD in float64 leaves, in every layer."""
    lora = LoraConfig(r=4, alpha=2, init_lora_weights="pissa", target_modules=("up_proj",))
    quant = ql.QuantConfig(double_quant=False)
    start = load_model(base, lora=lora, quant=quant, compute_dtype=jnp.float32)
    up = start.layers.mlp.up_proj
    original = load_file(base / "model.safetensors")
    for layer in range(CONFIG.num_hidden_layers):
        weight = np.float64(original[f"model.layers.{layer}.mlp.up_proj.weight"])
        left, values, right = np.linalg.svd(weight)
        top = left[:, :4] * values[:4] @ right[:4]
        low = lora.scaling * up.lora_B[...][layer] @ up.lora_A[...][layer]
        rounding = 8 * np.finfo(np.float32).eps * values[0]  # of a float32 SVD
        np.testing.assert_allclose(low, top, rtol=0, atol=rounding)
        found = np.float64(up.kernel.get_value().dequantize()[layer])
        rest = np.float64(ql.quantize(np.float32(weight - top), quant).dequantize())
        # As near to what is left as its own codes are.
        own = np.abs(rest - (weight - top))
        assert (np.abs(found - (weight - top)) <= own + rounding).all()
    save_adapter(tmp_path, start, lora, "base")
    read = read_adapter_config(tmp_path)
    again = load_model(base, lora=read, quant=quant, compute_dtype=jnp.float32)
    load_adapter(tmp_path, again)
    np.testing.assert_array_equal(logits(again), logits(start))
    plain = dataclasses.replace(lora, init_lora_weights=True)
    with pytest.raises(ValueError, match="which leave different base weights"):
        load_adapter(tmp_path, load_model(base, lora=plain, quant=quant))
    change_config(tmp_path, file="adapter_config.json", init_lora_weights=True)
    with pytest.raises(ValueError, match="which leave different base weights"):
        load_adapter(tmp_path, start)


def test_loftq_needs_the_original(base: Path) -> None:
    lora = LoraConfig(r=2, init_lora_weights="loftq")
    with pytest.raises(ValueError, match="nothing was lost"):
        load_model(base, lora=lora, quant=None)


def test_a_tied_head_follows_the_trained_embedding(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    lora = LoraConfig(r=2, modules_to_save=("embed_tokens",))
    model = adapted(Decoder(config, rngs=nnx.Rngs(0)), lora)
    assert isinstance(model.embed_tokens.weight, TrainedParam)
    save_adapter(tmp_path / "a", model, lora, "base")
    path = tmp_path / "a" / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written["ensure_weight_tying"] is True
    load_adapter(tmp_path / "a", model)
    path.write_text(json.dumps(written | {"ensure_weight_tying": False}))
    load_adapter(tmp_path / "a", model)  # both copies are alike
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="as a copy apart from the matrix that this base shares"):
        load_adapter(tmp_path / "a", model)


def test_a_tied_head_is_trained_by_the_embeddings_name(tmp_path: Path) -> None:
    """By its own it was passed over where another module is named, too, and could not be loaded."""
    write_model(tmp_path / "base", dataclasses.replace(CONFIG, tie_word_embeddings=True))
    lora = LoraConfig(r=2, modules_to_save=("lm_head", "model.norm"))
    with pytest.raises(ValueError, match="name 'embed_tokens' instead, and both are trained"):
        load_model(tmp_path / "base", lora=lora)
    lora = dataclasses.replace(lora, modules_to_save=("lm_head", "embed_tokens"))
    model = load_model(tmp_path / "base", lora=lora)
    save_adapter(tmp_path / "a", model, lora, "base")
    load_adapter(tmp_path / "a", model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("q_proj", "lm_head"), "lm_head"),
        (("q_proj", "embed_tokens"), "embed_tokens"),
        (r".*(q_proj|lm_head)", "lm_head"),
    ],
)
def test_vocabularies_take_no_adapters(targets, named, tied, tmp_path: Path) -> None:
    """They were passed over where a linear layer is named, too; PEFT would have trained them."""
    write_model(tmp_path, dataclasses.replace(CONFIG, tie_word_embeddings=tied))
    lora = LoraConfig(r=2, target_modules=targets)
    with pytest.raises(ValueError, match=f"means '{named}', but .* name it in modules_to_save"):
        load_model(tmp_path, lora=lora)
    load_model(tmp_path, lora=dataclasses.replace(lora, exclude_modules=(named,)))


@pytest.mark.parametrize(
    ("name", "module", "others"),
    [
        ("gpt_neox", "embed_out", ("lm_head",)),
        ("t5_v1_1", "shared", ("encoder.embed_tokens", "decoder.embed_tokens")),
    ],
)
def test_what_transformers_calls_otherwise_is_saved_under_all_its_names(
    name: str, module: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    folder = shared_path(f"vectors/models/{name}")
    if name == "t5_v1_1":
        folder = _t5_with_a_head(tmp_path)
    lora = LoraConfig(r=2, target_modules=("dense", "q"), modules_to_save=(module,))
    options = {"quant": None, "compute_dtype": jnp.float32}
    model = load_model(folder, lora=lora, **options)
    save_adapter(tmp_path, model, lora, str(folder))
    weights = tmp_path / "adapter_model.safetensors"
    written = load_file(weights)
    whole = {f"base_model.model.{other}.weight" for other in (module, *others)}
    assert {tensor for tensor in written if "lora" not in tensor} == whole
    read = read_adapter_config(tmp_path)
    assert read.modules_to_save == (module, *others)

    # The copies that transformers computes with are enough.
    new = written[f"base_model.model.{module}.weight"] + 1
    copies = {f"base_model.model.{other}.weight": new for other in others}
    rest = {n: x for n, x in written.items() if n not in whole}
    save_file(rest | copies, weights)
    change_config(tmp_path, file="adapter_config.json", modules_to_save=list(others))
    again = load_model(folder, lora=read_adapter_config(tmp_path), **options)
    load_adapter(tmp_path, again)
    path = FAMILIES[again.config.model_type].weight_names(again.config)[f"{module}.weight"].path
    np.testing.assert_array_equal(node_at(again, path)[...], new)
    merged = merge(open_checkpoint(folder), tmp_path, "original").read(f"{module}.weight")
    np.testing.assert_array_equal(merged, new.astype(merged.dtype))

    for other in others if len(others) > 1 else ():
        # In PEFT the other copy is then as it was.
        save_file(rest | {f"base_model.model.{other}.weight": new}, weights)
        with pytest.raises(ValueError, match=f"trains '{other}' alone, one of the copies"):
            load_adapter(tmp_path, again)
        with pytest.raises(ValueError, match=f"trains '{other}' alone, one of the copies"):
            merge(open_checkpoint(folder), tmp_path, "original")

    save_file(written | {f"base_model.model.{others[-1]}.weight": new + 1}, weights)
    with pytest.raises(ValueError, match="apart, which are one matrix"):
        load_adapter(tmp_path, again)
    with pytest.raises(ValueError, match="apart, which are one matrix"):
        merge(open_checkpoint(folder), tmp_path, "original")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora=True, but the model .* does not have"),
        ({"modules_to_save": ["lm_head"]}, "the model keeps 'lm_head.weight' frozen"),
        ({"bias": "all"}, "the model keeps .*bias' frozen"),
        ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 12}}, "rank 3 at .*has 2"),
        ({"layers_to_transform": [0]}, "lacks an adapter of 'model.layers.1"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        *(
            ({"init_lora_weights": start}, "path_initial_model_for_weight_conversion")
            for start in ("olora", "corda", "lora_ga", "pissa_niter_4")
        ),
        *(
            ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits}}, "only 4-bit")
            for bits in (2, 8)
        ),
        ({"r": None}, "has r None"),
        ({"r": 2.5}, "has r 2.5, but a whole number"),
        ({"lora_dropout": "much"}, "lora_dropout 'much', but a number"),
        ({"target_modules": 5}, "target_modules 5, but a list of names"),
        ({"target_modules": None}, "has target_modules None, for which PEFT takes"),
        ({"target_modules": "(["}, "target_modules .*, but a list of names or a regular"),
        ({"modules_to_save": [1]}, "modules_to_save .*, but a list of names"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern .*, but names with whole numbers"),
        ({"rank_pattern": {"(?i)q": 2}}, "rank_pattern .*, but names with whole numbers"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern .*, but names with numbers"),
        ({"layers_to_transform": "0"}, "layers_to_transform '0', but a list of whole"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": "x"}}, "loftq_config"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "but a list of token ids"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ],
)
def test_what_the_model_lacks_is_refused(change: dict, words: str, adapter) -> None:
    folder, model = adapter
    path = folder / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | change))
    try:
        with pytest.raises(ValueError, match=words) as error:
            load_adapter(folder, model)
    finally:
        path.write_text(before)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.clear(), "holds no tensor"),
        (lambda t: t.update({n: x.astype(np.int32) for n, x in t.items()}), "is stored as "),
        (lambda t: t.update({n: x.reshape(-1) for n, x in t.items()}), "a matrix is needed"),
    ],
)
def test_damaged_tensors(damage, words: str, adapter, base: Path, tmp_path: Path) -> None:
    folder, model = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    shutil.copy(folder / "adapter_config.json", tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=words):
        load_adapter(tmp_path, model)
    with pytest.raises(ValueError, match=words):
        check_adapter(tmp_path)
    with pytest.raises(ValueError, match=words):
        merge(open_checkpoint(base), tmp_path, "original")


def test_an_adapter_is_checked_without_reading_a_tensor(adapter, monkeypatch) -> None:
    class Unread:
        """A safetensors file whose tensors stay where they are."""

        def __init__(self, file):
            self.keys, self.get_slice = file.keys, file.get_slice

    @contextlib.contextmanager
    def open_unread(path):
        with opened(path) as file:
            yield Unread(file)

    opened = adapter_file.open_safetensors
    monkeypatch.setattr(adapter_file, "open_safetensors", open_unread)
    folder, _ = adapter
    assert check_adapter(folder) == read_adapter_config(folder)
    with pytest.raises(AttributeError, match="get_tensor"):
        ql.checkpoints.read_adapter(folder)


@pytest.fixture(scope="module")
def adapter(dense: Decoder, tmp_path_factory):
    lora = LoraConfig(r=2, alpha=8, target_modules=("q_proj",))
    model, folder = adapted(dense, lora), tmp_path_factory.mktemp("adapter")
    save_adapter(folder, model, lora, "base")
    return folder, model


def test_an_old_peft_adapter() -> None:
    """PEFT 0.5's config is read; its pickle is not."""
    folder = shared_path("data/adapters/peft_opt125m_bnb_4bit")
    lora = read_adapter_config(folder)
    assert (lora.r, lora.alpha, lora.target_modules) == (8, 8, ("q_proj", "v_proj"))
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is a pickle .* load it once"):
        ql.checkpoints.read_adapter(folder)
