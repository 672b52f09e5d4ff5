"""One adapter, two programs: PEFT and this library give the same logits, in both directions.

Everything is float32 on the CPU, on the tiny random models of `vectors/models`. What is compared is
the effect of the adapter, so each adapter is moved away from its start first.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qlora_jax as ql
from qlora_jax.checkpoints import (
    load_adapter,
    load_model,
    merge,
    open_checkpoint,
    read_adapter_config,
    save_adapter,
    save_checkpoint,
)
from qlora_jax.models import FAMILIES
from tests.peers.models import SEEING, save_random

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")
peft = pytest.importorskip("peft", reason="make test-peers installs it")

IDS = np.asarray([[1, 3, 7, 20, 5, 9]], np.int32)
QUERY_VALUE = ("q_proj", "v_proj")
TARGETS = {
    "llama_ropescaled_tied": "all-linear",
    "mistral_sw8": QUERY_VALUE,
    "qwen2": ("q_proj", "down_proj"),
    "qwen3": QUERY_VALUE,
    "gemma2": ("o_proj", "gate_proj"),
    "gemma3_text": ("o_proj", "gate_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "opt": ("q_proj", "fc1", "fc2"),
    "bloom-even": ("query_key_value", "dense", "dense_4h_to_h"),
    "gemma-first": ("o_proj", "gate_proj"),
    "granite-scaled": "all-linear",
    "ministral-mixed": QUERY_VALUE,
    "olmo2-biased": ("q_proj", "down_proj"),
    "olmo3-windows": "all-linear",
    "smollm3-still": QUERY_VALUE,
    "stablelm-biased": QUERY_VALUE,
    "starcoder2-window": ("q_proj", "c_fc", "c_proj"),
    "mixtral": ("q_proj", "w1", "w2", "w3"),
    "qwen3_moe-normed": ("q_proj", "gate_proj", "up_proj", "down_proj"),
    "olmoe-normed": ("q_proj", "gate_proj", "up_proj", "down_proj"),
    "t5_v1_0": ("q", "v"),
    "t5_v1_1": ("q", "wi_0", "wo"),
}
EXPERTS = {"mixtral", "olmoe-normed", "qwen3_moe-normed"}
"""Whose new adapters PEFT writes as `target_parameters`: `test_packed_experts.py`."""


def theirs(folder):
    """The base in transformers."""
    config = json.loads((folder / "config.json").read_text())
    seq2seq = config["model_type"] == "t5"
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def their_logits(model) -> np.ndarray:
    ids = torch.from_numpy(IDS).long()
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits.numpy()


def our_logits(model) -> np.ndarray:
    ids = jnp.asarray(IDS)
    more = (ids,) if type(model).__name__ == "EncoderDecoder" else ()
    return np.asarray(nnx.jit(lambda model: model(ids, *more))(model))


def ours(folder, lora):
    family = json.loads((folder / "config.json").read_text())["model_type"]
    if family not in FAMILIES:
        pytest.skip(f"{family} is no family here")
    return load_model(folder, quant=None, lora=lora, compute_dtype=jnp.float32)


def moved(model):
    """Random numbers where B is zero, and a little off everywhere else that is trained."""
    state = nnx.state(model, nnx.LoRAParam)
    keys = iter(jax.random.split(jax.random.key(0), 200))

    def move(path, leaf):
        name = jax.tree_util.keystr(path)
        if "lora_A" in name:
            return leaf
        noise = jax.random.normal(next(keys), leaf.shape)
        return leaf + (0.1 * noise if "lora_B" in name else 0.05 * noise)

    nnx.update(model, jax.tree_util.tree_map_with_path(move, state))
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, ql.QuantDense) and layer.lora_scaling is not None:
            # Zeros that fill up a smaller rank, or stand for no adapter, stay zeros.
            used = jnp.abs(layer.lora_A[...]).max(-1) > 0
            layer.lora_B[...] = layer.lora_B[...] * used[..., None, :]
    return model


def same(a: np.ndarray, b: np.ndarray, base: np.ndarray) -> None:
    assert np.abs(a - base).max() > 1e-3 * np.ptp(base), "the adapter changes nothing"
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.ptp(b))


@pytest.mark.parametrize("name", TARGETS)
def test_ours_in_peft(name: str, vectors, tmp_path) -> None:
    """Trained here, used there."""
    folder = vectors(name)
    lora = ql.LoraConfig(r=4, alpha=8, target_modules=TARGETS[name])
    model = moved(ours(folder, lora))
    save_adapter(tmp_path, model, lora, str(folder))
    base = theirs(folder)
    before = their_logits(base)
    same(our_logits(model), their_logits(peft.PeftModel.from_pretrained(base, tmp_path)), before)


def peft_adapter(base, folder, **options):
    """A PEFT adapter with its numbers moved, saved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in EXPERTS])
def test_pefts_here(name: str, vectors, tmp_path) -> None:
    """Trained there, used here, and left out again."""
    folder = vectors(name)
    targets = TARGETS[name] if isinstance(TARGETS[name], str) else list(TARGETS[name])
    base = theirs(folder)
    before = their_logits(base)
    trained = peft_adapter(base, tmp_path, r=4, lora_alpha=8, target_modules=targets)
    model = ours(folder, read_adapter_config(tmp_path))
    load_adapter(tmp_path, model)
    same(our_logits(model), their_logits(trained), before)
    with trained.disable_adapter():
        off = their_logits(trained)
    view = our_logits(nnx.view(model, adapters=False))
    np.testing.assert_allclose(view, off, rtol=0, atol=1e-5 * np.ptp(off))


KINDS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, one layer": {"use_dora": True, "layers_to_transform": [1]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {r"model\.layers\.0\..*": 3}},
    "layers_to_transform": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "expression": {"target_modules": r".*layers\.1\.self_attn\.[qk]_proj"},
    "exclude": {"exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "pissa": {"init_lora_weights": "pissa"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def test_all_biases_and_saved_norms(vectors, tmp_path) -> None:
    """PEFT saves the biases of the norms three times."""
    folder = vectors("opt")
    base = theirs(folder)
    before = their_logits(base)
    options = {"target_modules": ["v_proj"], "modules_to_save": ["final_layer_norm"]}
    trained = peft_adapter(base, tmp_path, r=4, lora_alpha=8, bias="all", **options)
    model = ours(folder, read_adapter_config(tmp_path))
    load_adapter(tmp_path, model)
    same(our_logits(model), their_logits(trained), before)
    name = "model.decoder.final_layer_norm.bias"
    read = merge(open_checkpoint(folder), tmp_path, "original").read(name)
    theirs_merged = trained.merge_and_unload().state_dict()[name].numpy()
    np.testing.assert_array_equal(read, theirs_merged.astype(read.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_both_ways(kind: str, vectors, tmp_path) -> None:
    """Qwen 2: biased q, k, v. What trains the head takes Mistral, which has one of its own."""
    folder = vectors("mistral_sw8" if kind == "saved" else "qwen2")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj"]}
    options |= KINDS[kind]
    base = theirs(folder)
    before = their_logits(base)
    trained = peft_adapter(base, tmp_path / "theirs", **options)
    lora = read_adapter_config(tmp_path / "theirs")
    model = ours(folder, lora)
    load_adapter(tmp_path / "theirs", model)
    same(our_logits(model), their_logits(trained), before)
    model = moved(model)
    save_adapter(tmp_path / "ours", model, lora, str(folder))
    read = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    same(our_logits(model), their_logits(read), before)
    merged = their_logits(read.merge_and_unload())
    same(our_logits(ql.merge_lora(model)), merged, before)


def test_a_head_that_transformers_5_calls_otherwise(vectors, tmp_path) -> None:
    """GPT-NeoX: `embed_out` in files and in transformers 4, `lm_head` in transformers 5."""
    folder = vectors("gpt_neox")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["dense"], "modules_to_save": ["lm_head"]}
    base = theirs(folder)
    before = their_logits(base)
    trained = peft_adapter(base, tmp_path / "theirs", **options)
    model = ours(folder, read_adapter_config(tmp_path / "theirs"))
    load_adapter(tmp_path / "theirs", model)
    same(our_logits(model), their_logits(trained), before)
    checkpoint = merge(open_checkpoint(folder), tmp_path / "theirs", "original")
    merged = trained.merge_and_unload().state_dict()["lm_head.weight"].numpy()
    read = checkpoint.read("embed_out.weight")
    np.testing.assert_array_equal(read, merged.astype(read.dtype))

    lora = ql.LoraConfig(r=4, target_modules=("dense",), modules_to_save=("embed_out",))
    model = moved(ours(folder, lora))
    save_adapter(tmp_path / "ours", model, lora, str(folder))
    peer = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    same(our_logits(model), their_logits(peer), before)
    again = ours(folder, read_adapter_config(tmp_path / "ours"))
    load_adapter(tmp_path / "ours", again)
    np.testing.assert_array_equal(our_logits(again), our_logits(model))


def test_t5s_embedding_trained_whole(tmp_path) -> None:
    """PEFT has the copies that encoder and decoder read, not the one that files hold."""
    folder = tmp_path / "base"
    save_random("t5 v1.1", folder)
    lora = ql.LoraConfig(r=2, target_modules=("q",), modules_to_save=("shared",))
    model = moved(ours(folder, lora))
    save_adapter(tmp_path, model, lora, str(folder))
    base = theirs(folder)
    before = their_logits(base)
    peer = peft.PeftModel.from_pretrained(base, tmp_path)
    same(our_logits(model), their_logits(peer), before)


def test_doras_gradients_are_pefts(vectors, tmp_path) -> None:
    folder = vectors("qwen2")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "use_dora": True}
    trained = peft_adapter(theirs(folder), tmp_path, **options)
    ids = torch.from_numpy(IDS).long()
    (trained(input_ids=ids).logits ** 2).sum().backward()
    gradients = {n: p.grad.numpy() for n, p in trained.named_parameters() if p.grad is not None}
    model = ours(folder, read_adapter_config(tmp_path))
    load_adapter(tmp_path, model)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    loss = lambda lora: jnp.sum(nnx.merge(graphdef, lora, rest)(jnp.asarray(IDS)) ** 2)  # noqa: E731
    found = jax.jit(jax.grad(loss))(lora)["layers"]["mlp"]["up_proj"]
    for name, value in found.items():
        for layer, mine in enumerate(np.asarray(value.get_value())):
            prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj.{name}.default.weight"
            expected = gradients[prefix]
            np.testing.assert_allclose(mine, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["llama_ropescaled_tied", "qwen2", "gemma2"])
def test_added_tokens_in_peft(name: str, vectors, tmp_path) -> None:
    """PEFT's user grows the model first; the rows then come from the adapter."""
    folder = vectors(name)
    lora = ql.LoraConfig(r=2, target_modules=QUERY_VALUE)
    model = ours(folder, lora)
    rows = model.config.vocab_size
    ql.resize_token_embeddings(model, rows + 3)
    ql.train_tokens(model, [rows, rows + 2, 5])
    model = moved(model)
    save_adapter(tmp_path, model, lora, str(folder))
    base = theirs(folder)
    base.resize_token_embeddings(rows + 3, mean_resizing=False)
    read = peft.PeftModel.from_pretrained(base, tmp_path)
    kept = [i for i in range(rows + 3) if i != rows + 1]  # a frozen row, drawn anew there
    global IDS
    before, IDS = IDS, np.asarray([[1, rows, 5, rows + 2, 9, 3]], np.int32)
    try:
        a, b = our_logits(model)[..., kept], their_logits(read)[..., kept]
    finally:
        IDS = before
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.ptp(b))


@pytest.mark.parametrize("indices", [[3, 7], {"embed_tokens": [3, 7], "lm_head": [7]}])
def test_pefts_tokens_here(indices, vectors, tmp_path) -> None:
    folder = vectors("qwen2")
    base = theirs(folder)
    before = their_logits(base)
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": indices}
    trained = peft_adapter(base, tmp_path, **options)
    model = ours(folder, read_adapter_config(tmp_path))
    load_adapter(tmp_path, model)
    same(our_logits(model), their_logits(trained), before)


def test_a_tied_embedding_trained_whole(vectors, tmp_path) -> None:
    folder = vectors("llama_ropescaled_tied")
    lora = ql.LoraConfig(r=2, target_modules=QUERY_VALUE, modules_to_save=("embed_tokens",))
    model = moved(ours(folder, lora))
    save_adapter(tmp_path, model, lora, str(folder))
    base = theirs(folder)
    before = their_logits(base)
    read = peft.PeftModel.from_pretrained(base, tmp_path)
    same(our_logits(model), their_logits(read), before)


def test_older_names_of_a_magnitude(vectors, tmp_path) -> None:
    """Written with and without ".weight" by different versions."""
    folder = vectors("qwen2")
    options = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
    trained = peft_adapter(theirs(folder), tmp_path, **options)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    ends = "lora_magnitude_vector"
    save_file({f"{k}.weight" if k.endswith(ends) else k: v for k, v in tensors.items()}, path)
    model = ours(folder, read_adapter_config(tmp_path))
    load_adapter(tmp_path, model)
    np.testing.assert_allclose(our_logits(model), their_logits(trained), rtol=0, atol=1e-4)


@pytest.fixture
def seeing(tmp_path):
    """A folder with a Gemma 3 that also sees, as transformers saves it, and the model."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gemma3", **SEEING)
    made = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    made.save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing", made


def test_ours_in_the_model_that_sees(seeing, tmp_path) -> None:
    """Trained on the text part here, used in PEFT on the whole, whose eye has layers of the same
    last names; merged here into the whole; read here again."""
    folder, whole = seeing
    lora = ql.LoraConfig(
        r=4,
        alpha=8,
        target_modules=("q_proj", "down_proj"),
        layers_to_transform=(1,),
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 4},
        modules_to_save=("embed_tokens",),
    )
    model = moved(ours(folder, lora))
    save_adapter(tmp_path / "adapter", model, lora, str(folder))
    before, trained = their_logits(whole), our_logits(model)
    merged = merge(open_checkpoint(folder), tmp_path / "adapter", "original")
    with_adapter = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
    assert not [n for n, _ in with_adapter.named_parameters() if "vision" in n and "lora" in n]
    same(trained, their_logits(with_adapter), before)
    again = ours(folder, read_adapter_config(tmp_path / "adapter"))
    load_adapter(tmp_path / "adapter", again)
    np.testing.assert_array_equal(our_logits(again), trained)
    save_checkpoint(tmp_path / "merged", merged)
    auto = transformers.AutoModelForImageTextToText
    same(trained, their_logits(auto.from_pretrained(tmp_path / "merged").float()), before)


@pytest.mark.parametrize("named", ["in full", "by an expression"])
def test_pefts_of_the_model_that_sees_here(named, seeing, tmp_path) -> None:
    folder, whole = seeing
    before = their_logits(whole)
    layers = [n for n, _ in whole.named_modules() if n.endswith(("q_proj", "up_proj"))]
    targets = [n for n in layers if "language_model" in n]
    if named == "by an expression":
        targets = r"(?:.*?language.*?(?:q_proj|up_proj))"
    trained = peft_adapter(whole, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=targets)
    model = ours(folder, read_adapter_config(tmp_path / "adapter"))
    load_adapter(tmp_path / "adapter", model)
    same(our_logits(model), their_logits(trained), before)
