import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import (
    linear_weights,
    load_model,
    open_checkpoint,
    quantized,
    save_checkpoint,
    save_model,
)
from qlora_jax.models import FAMILIES, Decoder, family_of, next_token_loss
from qlora_jax.models.rope import RopeConfig, attention_factor
from qlora_jax.nn import LoraConfig, QuantDense
from qlora_jax.quant import QuantConfig, QuantizedTensor
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder
from tests.shared import shared_path

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 7)), jnp.int32)
LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEARS = {
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}


def abstract(config, **options) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_configs(name):
    """The map covers every weight once, LoRA's names are the checkpoint's, and configs return."""
    config = VARIANTS[name]
    family = FAMILIES[config.model_type]
    assert family.read_config(json.loads(json.dumps(family.write_config(config)))) == config
    model = abstract(config, quant=QuantConfig(), lora=LoraConfig(r=2))
    slots = family.weight_names(config)
    assert len(set(slots.values())) == len(slots)
    paths = {
        tuple(path)
        for path, value in nnx.iter_graph(model)
        if isinstance(value, nnx.Variable) and not isinstance(value, nnx.LoRAParam)
    }
    assert {slot.path for slot in slots.values()} == paths
    linears = {tuple(p): m for p, m in nnx.iter_graph(model) if isinstance(m, QuantDense)}
    for path, layer in linears.items():
        assert layer.lora is not None, "all-linear means all"
        assert isinstance(layer.kernel.get_value(), QuantizedTensor)
        modules = [n for n, slot in slots.items() if slot.path == (*path, "kernel")]
        assert {n.split(".")[-2] for n in modules} == {path[-1]}
        assert len(modules) == np.prod(layer.stack_shape)
    extra = set(config.outer_linears)
    assert {p[-1] for p in linears} == LINEARS.get(config.model_type, LLAMA_LINEARS) | extra


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mixtral-window", marks=pytest.mark.slow),
        pytest.param("qwen3_moe-shares", marks=pytest.mark.slow),
        pytest.param("gpt_neox-parallel", marks=pytest.mark.slow),
        pytest.param("bloom-even", marks=pytest.mark.slow),
        pytest.param("gemma3_text-scaled", marks=pytest.mark.slow),
        "opt-350m",
        pytest.param("phi3-long", marks=pytest.mark.slow),
    ],
)
def test_quantized_with_adapters(name):
    """Gradients reach every adapter and nothing else; a dropout key changes the loss."""
    lora = LoraConfig(r=2, lora_dropout=0.3)
    model = Decoder(VARIANTS[name], quant=QuantConfig(), lora=lora, remat="none", rngs=nnx.Rngs(0))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    adapters = jax.tree.map(lambda x: jnp.full_like(x, 0.1) if not x.any() else x, adapters)

    @jax.jit
    def run(adapters, rest, key):
        def loss(adapters):
            merged = nnx.merge(graphdef, adapters, rest)
            return next_token_loss(merged, IDS, IDS, dropout_key=key).mean

        return jax.value_and_grad(loss)(adapters)

    losses = []
    for seed in (0, 1):
        loss, gradient = run(adapters, rest, jax.random.key(seed))
        losses.append(float(loss))
        for leaf in jax.tree.leaves(gradient):
            assert np.isfinite(leaf).all()
            # Every layer, and every expert that a token went to, has a gradient of its own.
            assert np.any(leaf)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "name",
    [
        "mixtral-window",
        "opt-350m",
        pytest.param("qwen3_moe-normed", marks=pytest.mark.slow),
        pytest.param("bloom-even", marks=pytest.mark.slow),
    ],
)
def test_a_folder_in_4_bits_loads_byte_for_byte(name, tmp_path):
    save_model(tmp_path / "dense", random_decoder(VARIANTS[name]))
    base = open_checkpoint(tmp_path / "dense")
    save_checkpoint(tmp_path / "packed", quantized(base, linear_weights(base), QuantConfig()))
    ours, theirs = (
        nnx.state(load_model(tmp_path / folder, lora=None, compute_dtype=jnp.float32))
        for folder in ("dense", "packed")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_in_a_folder_of_a_model_without_its_head(name, tmp_path):
    """What transformers' AutoModel saves leads no name with what its ForCausalLM leads all with."""
    config = VARIANTS[name]
    family = FAMILIES[config.model_type]
    names = family.weight_names(config)
    (tmp_path / "config.json").write_text(json.dumps(family.write_config(config)))
    bare = {name.removeprefix(f"{family.root}."): np.zeros(1, np.float32) for name in names}
    assert len(bare.keys() - names) >= len(names) - 1
    save_file(bare, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == names.keys()


def test_unknown_target_names_the_family_s_layers():
    with pytest.raises(ValueError, match=r"it has query_key_value, dense, dense_h_to_4h, dense_4h"):
        abstract(VARIANTS["gpt_neox-serial"], lora=LoraConfig(target_modules=("q_proj",)))
    with pytest.raises(ValueError, match="fc1, fc2, project_in, project_out"):
        abstract(VARIANTS["opt-350m"], lora=LoraConfig(target_modules=("up_proj",)))


def test_experts_as_peft_users_name_them():
    lora = LoraConfig(r=2, target_modules=("w1", "w2"))
    model = abstract(VARIANTS["mixtral-window"], lora=lora)
    experts = model.layers.block_sparse_moe.experts
    assert experts.w1.lora_A.get_value().shape == (3, 3, 2, 32)
    assert experts.w3.lora is None
    assert model.layers.self_attn.q_proj.lora is None


def test_every_token_meets_exactly_its_experts():
    """Against all experts on all tokens, in float64; one expert may get everything."""
    config = VARIANTS["mixtral-window"]
    model = random_decoder(config, seed=3)
    block = jax.tree.map(lambda x: x[0], nnx.state(model.layers.block_sparse_moe))
    moe = nnx.merge(nnx.graphdef(model.layers.block_sparse_moe), block)
    x = np.random.default_rng(1).normal(size=(2, 9, 32)).astype(np.float32)
    gate = np.asarray(moe.gate[...], np.float64) * 20
    w1, w3, w2 = (
        np.asarray(getattr(moe.experts, n).kernel[...], np.float64) for n in ("w1", "w3", "w2")
    )
    keys = dict.fromkeys(config.mlp_linears)
    call = jax.jit(lambda moe, x: moe(x, dropout_keys=keys))
    crowded = np.zeros_like(gate)
    crowded[1] = np.abs(gate).sum() * np.sign(x.reshape(-1, 32).sum(0))
    # Shares of the chosen add up to 1, or are of all.
    for router, normed in ((gate, True), (crowded, True), (gate / 20, False)):
        moe.config = dataclasses.replace(config, norm_topk_prob=normed)
        moe.gate.set_value(jnp.asarray(router, jnp.float32))
        flat = x.reshape(-1, 32).astype(np.float64)
        scores = flat @ router.T
        share = np.exp(scores - scores.max(-1, keepdims=True))
        whole = share.sum(-1, keepdims=True)
        lowest = np.argsort(-share, axis=-1, kind="stable")[:, config.num_experts_per_tok :]
        np.put_along_axis(share, lowest, 0.0, axis=-1)
        share /= share.sum(-1, keepdims=True) if normed else whole
        inner = np.einsum("te,xie->txi", flat, w1)
        inner = inner / (1 + np.exp(-inner)) * np.einsum("te,xie->txi", flat, w3)
        expected = np.einsum("txi,xei,tx->te", inner, w2, share).reshape(x.shape)
        np.testing.assert_allclose(call(moe, x), expected, atol=2e-5)


def test_layers_that_are_all_of_one_type():
    """What each type has of its own holds where there is no layer of the other."""
    windows = VARIANTS["gemma3_text-windows"]
    assert windows.layer_types is None
    same = {
        windows: dataclasses.replace(windows, rope=windows.local_rope, local_rope=None),
        dataclasses.replace(windows, layer_types=("full_attention",) * 3): dataclasses.replace(
            windows, sliding_window=None, local_rope=None
        ),
    }
    outputs = []
    for config, plain in same.items():
        one, other = (jax.jit(random_decoder(each))(IDS) for each in (config, plain))
        np.testing.assert_array_equal(one, other)
        outputs.append(one)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_a_gemma_without_windows_is_written_with_one():
    """transformers does not build a Gemma that names none."""
    for name in ("gemma2-plain", "gemma3_text-scaled"):
        plain = dataclasses.replace(VARIANTS[name], sliding_window=None, layer_types=None)
        written = FAMILIES[plain.model_type].write_config(plain)
        assert written["sliding_window"] == 4096
        assert FAMILIES[plain.model_type].read_config(written) == plain


def test_a_gemma_3_has_no_cap_on_its_scores():
    config = VARIANTS["gemma3_text-scaled"]
    family = FAMILIES["gemma3_text"]
    written = family.write_config(config) | {"attn_logit_softcapping": 2.0}
    assert family.read_config(written) == config


def test_windows_with_a_scaled_rope_are_not_written():
    scaled = RopeConfig(rope_type="linear", factor=2.0)
    config = dataclasses.replace(VARIANTS["gemma3_text-scaled"], local_rope=scaled)
    with pytest.raises(ValueError, match="local_rope has rope_type 'linear'"):
        FAMILIES["gemma3_text"].write_config(config)


def test_the_factor_of_a_rope():
    """A yarn's null is the quotient of the lengths; a longrope's factor sets its multiplier."""
    family = FAMILIES["llama"]

    def read(**scaling) -> RopeConfig:
        config = family.write_config(VARIANTS["llama-biased"])
        lengths = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
        config = family.read_config({**config, **lengths, "rope_parameters": scaling | lengths})
        again = family.read_config(family.write_config(config))
        assert again == config
        return config.rope

    assert read(rope_type="yarn", factor=None).factor == 4
    assert read(rope_type="yarn", factor=2.0).factor == 2
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for factor, expected in ((None, 4), (4.0, 4), (8.0, 8), (0.5, 1)):
        multiplier = np.sqrt(1 + np.log(expected) / np.log(16))
        assert attention_factor(read(**longrope, factor=factor)) == pytest.approx(multiplier)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16.0}
        | {"beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
        {"rope_type": "longrope", "factor": 4.0, "attention_factor": 1.5}
        | {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_all_that_a_scaled_rope_says_is_read_and_written(scaling):
    family = FAMILIES["llama"]
    given = _BASE | {"model_type": "llama", "rope_parameters": scaling}
    lengths = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    config = family.read_config(given | lengths)
    assert {name: getattr(config.rope, name) for name in scaling} == scaling
    assert family.read_config(json.loads(json.dumps(family.write_config(config)))) == config


def test_decoders_that_cannot_be():
    config = VARIANTS["mixtral-window"]
    for name, wrong in (("num_experts_per_tok", 0), ("vocab_size", True), ("head_dim", 0)):
        with pytest.raises(ValueError, match=f"{name} is {wrong}, but"):
            dataclasses.replace(config, **{name: wrong})


def test_learned_positions_end():
    config = dataclasses.replace(VARIANTS["opt-unbiased"], max_position_embeddings=6)
    model = abstract(config)
    with pytest.raises(ValueError, match="has 7 tokens, but the model has learned 6 positions"):
        jax.eval_shape(lambda model: model(IDS), model)
    with pytest.raises(ValueError, match="has 9 tokens, but the model has learned 6 positions"):
        jax.eval_shape(lambda model: model.prefill(IDS[:, :4], cache_length=9), model)


def test_packed_rows_equal_rows_of_their_own():
    model = random_decoder(VARIANTS["gemma3_text-scaled"])
    call = jax.jit(lambda model, ids, **options: model(ids, **options))
    packed = call(
        model,
        jnp.concatenate([IDS[:1], IDS[1:]], axis=1),
        segments=jnp.asarray([[1] * 7 + [2] * 7], jnp.int32),
    )
    alone = call(model, IDS)
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=2e-5)


def test_text_part_of_a_gemma_that_sees(tmp_path):
    folder = shared_path("vectors/models/gemma3_text")
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folder / "model.safetensors")
    seeing = {f"language_model.{name}": value for name, value in tensors.items()}
    seeing["vision_tower.vision_model.embeddings.weight"] = np.zeros((2, 2), np.float32)
    save_file(seeing, tmp_path / "model.safetensors")
    options = {"quant": None, "lora": None, "compute_dtype": jnp.float32}
    one, other = load_model(folder, **options), load_model(tmp_path, **options)
    # It only remembers that the whole sees, for the names of its adapters.
    assert dataclasses.replace(one.config, sees=True) == other.config
    # transformers caps the logits of a text model alone.
    capped = whole | {"text_config": text | {"final_logit_softcapping": 3.0}}
    assert FAMILIES["gemma3"].read_config(capped) == other.config
    save_model(tmp_path / "saved", other)
    assert load_model(tmp_path / "saved", **options).config == one.config
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(tensors)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))
    # Whether the head is the embedding, the whole config.json says, not its text part.
    head = {"language_model.lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}
    save_file(seeing | head, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(whole | {"tie_word_embeddings": False}))
    assert text["tie_word_embeddings"]
    untied = load_model(tmp_path, **options).lm_head.weight[...]
    np.testing.assert_array_equal(untied, head["language_model.lm_head.weight"])


_LINEAR = {"rope_type": "linear", "factor": 2.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("model_type", "given", "expected"),
    [
        # As transformers 5.24 reads them.
        ("llama", {"rope_scaling": _LLAMA3, "original_max_position_embeddings": 16}, 16),
        ("llama", {"rope_scaling": _YARN, "original_max_position_embeddings": 32}, 32),
        ("llama", {"rope_scaling": _DYNAMIC, "original_max_position_embeddings": 16}, 2048),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 32768),
        ("phi3", {"rope_scaling": _LONG}, 4096),
        ("phi3", {"rope_scaling": _LONG, "original_max_position_embeddings": 16}, 16),
    ],
)
def test_the_length_that_a_rope_was_trained_for(model_type, given, expected):
    rope = FAMILIES[model_type].read_config(_BASE | {"model_type": model_type} | given).rope
    assert rope.original_max_position_embeddings == expected


def test_the_length_of_a_gemma_3s_other_rope():
    """That of the windows, where it is scaled and names none."""
    ropes = {"full_attention": {"rope_type": "default"}, "sliding_attention": _DYNAMIC}
    given = {"model_type": "gemma3_text", "rope_parameters": ropes, "num_key_value_heads": 2}
    given |= _BASE | {"max_position_embeddings": 64}
    rope = FAMILIES["gemma3_text"].read_config(given).local_rope
    assert rope.original_max_position_embeddings == 64


def test_a_bloom_as_it_was_published():
    """config.json of 2022, which has two names for a width, and tensors without `transformer.`."""
    config = VARIANTS["bloom-even"]
    published = {
        "model_type": "bloom",
        "vocab_size": 48,
        "n_embed": 32,
        "n_inner": None,
        "n_layer": 3,
        "num_attention_heads": 4,
        "seq_length": 64,
        "layer_norm_epsilon": 1e-5,
        "offset_alibi": 100,
        "pretraining_tp": 1,
    }
    assert FAMILIES["bloom"].read_config(published) == config
    of_later = {"n_embed": None, "hidden_size": 32, "n_head": 4, "num_attention_heads": None}
    assert FAMILIES["bloom"].read_config(published | of_later) == config
    assert "transformer.word_embeddings_layernorm.bias" in FAMILIES["bloom"].weight_names(config)


def test_a_gpt_neox_names_its_rope_its_own_way():
    given = {"model_type": "gpt_neox", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    rope = FAMILIES["gpt_neox"].read_config(_BASE | given).rope
    assert (rope.rope_theta, rope.partial_rotary_factor) == (10000.0, 0.25)
    given |= {"rotary_emb_base": 5000.0, "rotary_pct": 0.75}
    rope = FAMILIES["gpt_neox"].read_config(_BASE | given).rope
    assert (rope.rope_theta, rope.partial_rotary_factor) == (5000.0, 0.75)


def test_activations_that_are_alike_in_transformers():
    for theirs in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        given = {"model_type": "gpt_neox", "hidden_act": theirs}
        assert FAMILIES["gpt_neox"].read_config(_BASE | given).hidden_act == "gelu_tanh"


def test_an_opt_without_its_last_norm():
    """Checkpoints that were finetuned by transformers before 4.20.1."""
    family = FAMILIES["opt"]
    given = {"model_type": "opt", "ffn_dim": 8, "_remove_final_layer_norm": True}
    config = family.read_config(_BASE | given)
    assert (config.residual, config.final_norm) == ("pre", False)
    assert family.read_config(family.write_config(config)) == config


def test_a_rope_that_stands_twice():
    """A user adds `rope_scaling`, as model cards say, to a file of transformers 5."""
    twice = {"rope_parameters": _LINEAR | {"rope_theta": 1e4}, "rope_scaling": _LINEAR}
    read = FAMILIES["llama"].read_config
    assert read(_BASE | {"model_type": "llama"} | twice).rope.factor == 2
    twice["rope_parameters"]["rope_theta"] = 1e6
    # The base that stands in the rope's own fields has the word.
    given = {"model_type": "llama", "rope_theta": 5e3, "rope_parameters": {"rope_theta": 1e6}}
    assert read(_BASE | given).rope.rope_theta == 1e6
    with pytest.raises(ValueError, match=r"both rope_scaling.* and they differ"):
        read(_BASE | {"model_type": "llama"} | twice)


_BASE = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_T5 = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


# Fields of our own configurations, as transformers 5.24 fills in a file without them.
_PLAIN = {"norm_eps": 1e-6, "tie_word_embeddings": False, "qkv_bias": False, "sliding_window": None}
_GEMMA = {"norm_eps": 1e-6, "tie_word_embeddings": True, "qkv_bias": False, "head_dim": 256}
_GEMMA |= {"attention_scale": 256**-0.5, "sliding_window": 4096, "hidden_act": "gelu_tanh"}
_BIASED = {"norm_eps": 1e-5, "max_position_embeddings": 2048, "qkv_bias": True, "o_bias": True}
_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
_UNSAID = {
    "llama": _PLAIN | {"max_position_embeddings": 2048, "mlp_bias": False},
    "mistral": _PLAIN | {"max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": _PLAIN | {"max_position_embeddings": 131072, "norm_eps": 1e-5} | _EXPERTS,
    "qwen2": _PLAIN | {"max_position_embeddings": 32768, "qkv_bias": True, "head_dim": 4},
    "qwen3": _PLAIN | {"max_position_embeddings": 32768, "head_dim": 128},
    "qwen3_moe": _PLAIN
    | {"num_local_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False}
    | {"max_position_embeddings": 32768, "intermediate_size": 768},
    "gemma2": _GEMMA
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    | {"max_position_embeddings": 8192},
    "gemma3_text": _GEMMA
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    | {"max_position_embeddings": 131072, "local_rope": RopeConfig(), "vocab_size": 262208}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    "phi3": _PLAIN | {"max_position_embeddings": 4096, "norm_eps": 1e-5},
    "gpt_neox": _BIASED | {"residual": "parallel", "hidden_act": "gelu"},
    "opt": _BIASED | {"residual": "pre", "final_norm": True, "tie_word_embeddings": True},
    "bloom": _BIASED | {"tie_word_embeddings": True},
    "roberta": {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    | {"pad_token_id": 1, "classifier_dropout": None, "num_labels": 2},
    "t5": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    | {"layer_norm_epsilon": 1e-6, "dropout_rate": 0.1, "feed_forward_proj": "relu"}
    | {"pad_token_id": 0, "eos_token_id": 1, "num_decoder_layers": 1}
    | {"tie_word_embeddings": True, "scale_decoder_outputs": True},
}
_BASES = {"mixtral": 1e6, "gemma3_text": 1e6} | dict.fromkeys(("opt", "bloom", "roberta", "t5"))


@pytest.mark.parametrize("model_type", _UNSAID)
def test_what_a_file_does_not_say(model_type):
    given = _BASE | (_T5 if model_type == "t5" else {}) | {"model_type": model_type, "ffn_dim": 8}
    if model_type == "gemma3_text":
        del given["vocab_size"], given["num_attention_heads"]
    config = family_of(given).read_config(given)
    expected = _UNSAID[model_type]
    assert {name: getattr(config, name) for name in expected} == expected
    rope = getattr(config, "rope", None)
    assert (None if rope is None else rope.rope_theta) == _BASES.get(model_type, 1e4)


def test_layers_that_slide_where_a_file_does_not_say():
    """transformers 5.24: every sixth layer of a Gemma 3 sees everything, of a Qwen 2 the first 28;
    the others 4096 tokens."""
    deep = _BASE | {"num_hidden_layers": 30, "num_attention_heads": 4}
    seen = FAMILIES["gemma3_text"].read_config(deep | {"model_type": "gemma3_text"}).sliding_layers
    assert [layer for layer, slides in enumerate(seen) if not slides] == [5, 11, 17, 23, 29]
    late = {"model_type": "qwen2", "use_sliding_window": True}
    config = FAMILIES["qwen2"].read_config(deep | late)
    every = FAMILIES["qwen2"].read_config(deep | late | {"max_window_layers": 0})
    assert all(every.sliding_layers)
    assert (config.sliding_window, config.sliding_layers.index(True)) == (4096, 28)


def test_a_mistral_whose_windows_are_in_some_layers():
    """Ministral's: transformers 5 reads a Mistral's `layer_types`, too."""
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    given = _BASE | {"model_type": "mistral", "num_attention_heads": 4, "num_hidden_layers": 3}
    family = FAMILIES["mistral"]
    config = family.read_config(given | {"sliding_window": 5, "layer_types": types})
    assert (config.sliding_window, config.sliding_layers) == (5, (False, True, True))
    assert family.write_config(config)["layer_types"] == types
    assert family.read_config(family.write_config(config)) == config
    every = family.read_config(given)
    assert (every.sliding_window, every.sliding_layers) == (4096, (True,) * 3)
    # A file that says so is another model to transformers.
    assert "layer_types" not in family.write_config(every)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "mistral", "attention_bias": True}, "only False is supported"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"]}, "layer_types"),
        ({"model_type": "gpt_neox", "hidden_act": "swish"}, "hidden_act 'swish'"),
        ({"model_type": ["llama"]}, r"has model_type \['llama'\]"),
        ({"model_type": "llama", "rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny', but a number"),
        ({"model_type": "llama", "rope_scaling": [1]}, r"rope_scaling \[1\], but an object"),
        ({"model_type": "llama", "rope_theta": "1e6"}, "rope_theta '1e6', but a number"),
        ({"model_type": "llama", "hidden_size": "8"}, "hidden_size '8', but a positive whole"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads 0, but a pos"),
        ({"model_type": "llama", "tie_word_embeddings": "false"}, "'false', but true or false"),
        ({"model_type": "roberta", "id2label": {"a": "b"}}, "an object of class numbers and names"),
        ({"model_type": "llama", "rope_theta": math.inf}, "rope_theta inf, but a number"),
        ({"model_type": "llama", "hidden_act": ["silu"]}, "hidden_act .*, but a text"),
        ({"model_type": "qwen2", "layer_types": 3}, "layer_types 3, but a list of texts"),
        ({"model_type": "qwen2", "max_window_layers": "2"}, "max_window_layers '2', but a whole"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": None}, "no 'query_pre_attn_scalar'"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "_scalar 0, but a positive number"),
        ({"model_type": "gemma3", "text_config": {"head_dim": 1.5}}, "head_dim 1.5, but a pos"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": ["a"]}},
            "short_factor .*, but a list of numbers",
        ),
        ({"model_type": "roberta", "id2label": ["A"]}, "id2label .*, but an object"),
        ({"model_type": "opt", "ffn_dim": 8, "layer_norm_elementwise_affine": False}, "affine"),
        (
            {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
            "_layernorm True, but only False",
        ),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
            r"mlp_only_layers \[0\], but only \[\]",
        ),
        (
            {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
            "decoder_sparse_step 2, but only 1",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 0},
            "num_experts 0, but a 'qwen3_moe' has some",
        ),
        ({"model_type": "bloom", "num_attention_heads": None}, "no 'num_attention_heads'"),
        ({"model_type": "bloom", "n_embed": 0}, "n_embed 0, but a positive whole number"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, "no 'short_factor'"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "'linear' without a factor"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn"}}, "'yarn' without a factor"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "llama3", "factor": None}},
            "'llama3' without a factor",
        ),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "factor 0.5, but a 'llama'"),
        (
            {"model_type": "qwen3", "rope_parameters": {"partial_rotary_factor": 0.5}},
            "factor 0.5, but a 'qwen3'",
        ),
        ({"model_type": "roberta", "is_decoder": True}, "is_decoder True"),
        # Embedding models, which see both ways.
        ({"model_type": "qwen2", "is_causal": False}, "is_causal False, but only True"),
        (_T5 | {"is_causal": False}, "is_causal False"),
        (_T5 | {"dense_act_fn": "gelu"}, "dense_act_fn 'gelu', but only 'relu'"),
        (
            _T5 | {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"},
            "dense_act_fn 'gelu', but only 'gelu_new'",
        ),
        (_T5 | {"is_gated_act": True}, "is_gated_act True"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"model_type": "llama", "head_dim": 3}, "head_dim is 3, but rotary positions need"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "3, does not divide"),
        (
            {"model_type": "gemma2", "num_key_value_heads": 1}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types has 2 entries, but there are 1 layers",
        ),
        (
            {"model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": [0]},
            "rope_layers has 1 entries, but there are 2 layers",
        ),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm True"),
        ({"model_type": "stablelm", "use_parallel_residual": True}, "use_parallel_residual True"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv 8.0"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling 0"),
    ],
)
def test_configs_that_are_not_built_here(given, message):
    with pytest.raises(ValueError, match=message):
        family_of(given).read_config(_BASE | given)


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        # What it was before there were two kinds.
        ("qk_norm", True, r"\(None, 'head', 'all'\)"),
        ("residual", "sandwhich", "'pre', 'post', 'after', 'sandwich', 'parallel'"),
        ("hidden_act", "gelu_pytorch_tanh", "'gelu_tanh'"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_kinds_that_there_are_not(name, value, known):
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but one of .*{known}"):
        dataclasses.replace(VARIANTS["llama-biased"], **{name: value})
