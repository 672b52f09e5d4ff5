"""GGUF files, both ways. The gguf package's own reader and quantizers are the second opinion here;
transformers' reader is in tests/peers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.checkpoints import (
    Checkpoint,
    TensorInfo,
    check_shapes,
    checkpoint_tokenizer,
    load_model,
    open_checkpoint,
    open_gguf,
    save_checkpoint,
    save_gguf,
)
from qlora_jax.checkpoints.gguf import FILE_TYPES
from qlora_jax.checkpoints.gguf.architecture import swap_rows
from qlora_jax.checkpoints.gguf.hyperparameters import to_config, to_metadata
from qlora_jax.checkpoints.gguf.vocabulary import (
    _from_json,
    from_files,
    from_metadata,
    tokenizer_files,
)
from qlora_jax.checkpoints.gguf.vocabulary import to_metadata as vocabulary_metadata
from qlora_jax.checkpoints.tokenizer import tokenizer_from_files
from qlora_jax.data import load_tokenizer
from qlora_jax.models import FAMILIES
from tests.shared import shared_path
from tests.vectors.qlora_run import logits

# What llama.cpp has no key for is set to what it assumes.
_GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
_MODELS = {
    "llama_ropescaled_tied": {},
    "mistral_sw8": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"layer_types": ["sliding_attention"] * 3},
}


def model_folder(name: str, folder: Path, **changes) -> Path:
    """A copy of one of the models in ../shared, with another config."""
    source = shared_path(f"vectors/models/{name}")
    config = json.loads((source / "config.json").read_text()) | changes
    assert config["model_type"] in FAMILIES
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", _MODELS)
def test_every_architecture_comes_back_with_its_weights_and_its_logits(name, tmp_path):
    original = open_checkpoint(model_folder(name, tmp_path, **_MODELS[name]))
    save_gguf(tmp_path / "model.gguf", original, "F32", tokenizer=False)
    back = open_gguf(tmp_path / "model.gguf")
    assert back.config["model_type"] == original.config["model_type"]
    assert set(back.tensors) == set(original.tensors)
    for tensor in original.tensors:
        expected = original.read(tensor).astype(np.float32)
        # Gemma's norms have had one added and taken off again.
        tolerance = 1e-6 if "gemma" in name else 0
        np.testing.assert_allclose(back.read(tensor), expected, rtol=0, atol=tolerance)
    ids = np.arange(12, dtype=np.int32)[None]
    options = {"quant": None, "lora": None, "compute_dtype": np.float32}
    ours, theirs = (logits(load_model(c, **options), ids, None) for c in (back, original))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_what_config_json_leaves_out_is_in_the_file(tmp_path):
    """transformers' values stand for it, and llama.cpp knows none of them."""
    source = open_checkpoint(model_folder("mistral_sw8", tmp_path))
    left_out = ("max_position_embeddings", "rms_norm_eps", "sliding_window", "tie_word_embeddings")
    config = {name: value for name, value in source.config.items() if name not in left_out}
    save_gguf(tmp_path / "m.gguf", replace(source, config=config), "F32", tokenizer=False)
    metadata = open_gguf(tmp_path / "m.gguf").config
    assert metadata["max_position_embeddings"] == 131072
    assert metadata["rms_norm_eps"] == 1e-6
    assert metadata["sliding_window"] == 4096


def test_biases_of_a_llamas_mlp_come_back(tmp_path):
    source = open_checkpoint(shared_path("vectors/llama/hf"))
    config = {**source.config, "mlp_bias": True}
    family = FAMILIES["llama"]
    biases = {
        name: TensorInfo(source.tensors[f"{name.removesuffix('bias')}weight"].shape[:1], "F32")
        for name in family.weight_names(family.read_config(config))
        if name.endswith(".bias")
    }

    def read(name: str) -> np.ndarray:
        return np.arange(*biases[name].shape, dtype=np.float32) if name in biases else own(name)

    own = source.read
    biased = replace(source, config=config, tensors={**source.tensors, **biases}, read=read)
    save_gguf(tmp_path / "m.gguf", biased, "F32", tokenizer=False)
    back = open_gguf(tmp_path / "m.gguf")
    check_shapes(back)
    for name in biases:
        np.testing.assert_array_equal(back.read(name), read(name))


# As published; google/gemma-2-27b and the text of google/gemma-3-27b-pt.
_LARGEST = {
    "gemma2": {
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "query_pre_attn_scalar": 144,
    },
    "gemma3_text": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "query_pre_attn_scalar": 168,
    },
}


@pytest.mark.parametrize("model_type", _LARGEST)
def test_the_largest_gemmas_scale_by_more_than_a_heads_width(model_type):
    """No key says it: llama.cpp takes hidden_size / heads where a Gemma has their depth."""
    shape = {
        "model_type": model_type,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    }
    family = FAMILIES[model_type]

    def metadata_of(**changes) -> dict:
        read = family.read_config(shape | _LARGEST[model_type] | changes)
        return to_metadata(family.write_config(read))[0]

    metadata = metadata_of()
    metadata["general.architecture"] = model_type.removesuffix("_text")
    config = to_config(metadata, {}, None)
    assert config["query_pre_attn_scalar"] == _LARGEST[model_type]["query_pre_attn_scalar"]
    scale = family.read_config(config).attention_scale
    assert scale == pytest.approx((config["hidden_size"] / 32) ** -0.5)
    with pytest.raises(ValueError, match=r"query_pre_attn_scalar is 128, but llama\.cpp takes 1"):
        metadata_of(query_pre_attn_scalar=128)


def test_the_names_and_keys_are_those_of_llama_cpps_own_files(tmp_path):
    folder = shared_path("data/models/stories260K")
    save_gguf(tmp_path / "model.gguf", open_checkpoint(folder), "Q8_0", name="Stories")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "Stories",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 5,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 172,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: keys[key] for key in expected} == expected
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.scores"]) == 512
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.4.attn_q.weight"] == "Q8_0"
    assert types["blk.4.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    # 172 columns are no whole number of blocks.
    assert types["blk.0.ffn_down.weight"] == "F16"


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_data_types_are_the_librarys(file_type, tmp_path):
    config = json.loads((shared_path("vectors/llama/hf") / "config.json").read_text())
    original = open_checkpoint(shared_path("vectors/llama/hf"))
    assert config["vocab_size"] == 256
    save_gguf(tmp_path / "model.gguf", original, file_type, tokenizer=False)
    back = open_gguf(tmp_path / "model.gguf")
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        weight = original.read(name).astype(np.float32)
        heads = 2 if "k_proj" in name else None
        rows = weight if heads is None else swap_rows(weight, heads, to_gguf=True)
        kind = gguf.GGMLQuantizationType[file_type]
        expected = gguf.dequantize(gguf.quantize(rows, kind), kind).reshape(rows.shape)
        expected = expected if heads is None else swap_rows(expected, heads, to_gguf=False)
        np.testing.assert_array_equal(back.read(name).astype(np.float32), expected)
    vocabulary = {tensor.name: tensor.tensor_type.name for tensor in _tensors(tmp_path)}
    narrow = file_type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
    for name in ("token_embd.weight", "output.weight"):
        assert vocabulary[name] == ("Q8_0" if narrow else file_type)


def _tensors(folder: Path) -> list:
    return gguf.GGUFReader(folder / "model.gguf").tensors


def test_llama_3s_frequencies_are_divided_by_llama_cpps_factors():
    config = json.loads(shared_path("vectors/llama/hf/config.json").read_text()) | {
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    _, tensors = to_metadata(config)
    factors = []
    for exponent in np.arange(0, 128, 2) / 128:
        wavelength = 2 * np.pi * 500000.0**exponent
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(tensors["rope_freqs.weight"], factors, rtol=2e-6)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([(), (3,)]))
def test_swapped_rows_swap_back(heads, pairs, rest):
    weight = np.random.default_rng(0).standard_normal((heads * pairs * 2, *rest))
    swapped = swap_rows(weight, heads, to_gguf=True)
    np.testing.assert_array_equal(swap_rows(swapped, heads, to_gguf=False), weight)
    # ggml turns neighbours, Hugging Face row i and i + dim/2.
    np.testing.assert_array_equal(swapped[1], weight[pairs])


TEXTS = st.one_of(st.text(max_size=40), st.text("ab  1290.,'ß\n\t日é🙂", max_size=60))


def _tokenizers(folder: str) -> tuple:
    """A tokenizer, and itself after a journey through GGUF's metadata."""
    path = shared_path(folder)
    files = {
        file.name: file.read_bytes()
        for file in path.iterdir()
        if file.suffix in (".json", ".model") and "index" not in file.name
    }
    own = tokenizer_from_files(files)
    words = from_files(files, own.vocab_size + 3)
    return own, tokenizer_from_files(tokenizer_files(from_metadata(vocabulary_metadata(words))))


@pytest.fixture(
    scope="module",
    params=[
        "data/models/smollm2-135m-instruct",
        "data/models/stories260K",
        "data/tokenizers/mistral-v0.1",
    ],
)
def pair(request):
    return _tokenizers(request.param)


@settings(max_examples=100)
@given(text=TEXTS)
def test_a_tokenizer_cuts_every_text_as_before(pair, text):
    before, after = pair
    text = text.replace("\x00", "")
    assert after.encode(text) == before.encode(text)


def test_special_tokens_stay(pair):
    before, after = pair
    assert (after.bos_token_id, after.add_bos) == (before.bos_token_id, before.add_bos)
    # A tokenizer.json alone does not say which token ends a text; the SentencePiece model does.
    assert before.eos_token_id in (after.eos_token_id, None)


def test_sentencepiece_scores_from_a_list_of_merges():
    """Llama 2's tokenizer is there in both forms: made from one, it cuts as the other."""
    folder = shared_path("data/tokenizers/llama2")
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    made = tokenizer_from_files(tokenizer_files(from_files(files, 32000)))
    own = load_tokenizer(folder / "tokenizer.model")
    text = shared_path("data/text/tinyshakespeare.txt").read_text()[:30000]
    assert made.encode(text) == own.encode(text)
    # Of several merges that make a piece, the first is the one that makes it.
    vocab = {piece: number for number, piece in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = ["a b", "b c", "ab c", "a bc"]
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges}
    assert _from_json({"model": model})["scores"] == [-4, -4, -4, 0, -1, -2]


def test_model_and_tokenizer_of_a_real_file(tmp_path):
    folder = shared_path("data/models/stories260K")
    original = open_checkpoint(folder)
    save_gguf(tmp_path / "model.gguf", original, "F16")
    (tmp_path / "folder").mkdir()
    shutil.move(tmp_path / "model.gguf", tmp_path / "folder" / "model.gguf")
    back = open_checkpoint(tmp_path / "folder")
    text = "Once upon a time, there was a cat."
    ids = checkpoint_tokenizer(back).encode(text)
    assert ids == load_tokenizer(folder).encode(text)
    # And written out as a Hugging Face folder, with the tokenizer's files.
    save_checkpoint(tmp_path / "hf", back)
    assert load_tokenizer(tmp_path / "hf").encode(text) == ids
    options = {"quant": None, "lora": None, "compute_dtype": np.float32}
    row = np.asarray([ids], np.int32)
    ours, theirs = (
        logits(load_model(source, **options), row, None) for source in (tmp_path / "hf", folder)
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02)  # float16 weights; 0.006 seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(path, open_checkpoint(shared_path("vectors/llama/hf")), "Q8_0", tokenizer=False)
    return path.read_bytes()


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_one_clear_sentence(whole, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "model.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="is truncated") as error:
        open_gguf(path)
    assert "\n" not in str(error.value)


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(400))
    with pytest.raises(ValueError, match="is no GGUF file"):
        open_gguf(tmp_path / "model.gguf")


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def checkpoint(**config) -> Checkpoint:
    """Nothing but a config: what is refused is refused before a tensor is looked at."""
    own = json.loads(shared_path("vectors/llama/hf/config.json").read_text())
    tensors = {"model.norm.weight": TensorInfo((128,), "F32")}
    return Checkpoint(Path("made"), own | config, tensors, lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    ("changes", "file_type", "message"),
    [
        ({}, "Q4_K", r"choose one of .*reads K-quants but does not write them.*llama-quantize"),
        ({}, "Q3", "choose one of F32, F16"),
        ({"model_type": "gpt_neox"}, "Q8_0", "'gpt_neox', but GGUF files are written for llama"),
        (
            {"model_type": "gemma2", **_GEMMA, "query_pre_attn_scalar": 24},
            "F16",
            "cannot say otherwise",
        ),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention"] * 2, **_GEMMA},
            "F16",
            "the last of every 2 layers",
        ),
        (
            {"model_type": "gemma3_text", "rope_local_base_freq": 5e4, **_GEMMA},
            "F16",
            "windows' rope_theta is 50000, but llama.cpp turns them by 10000",
        ),
        (
            {"model_type": "gemma2", "final_logit_softcapping": None, **_GEMMA},
            "F16",
            r"are \[50.0, None\], but llama.cpp caps",
        ),
        ({"hidden_act": "gelu"}, "F16", "hidden_act 'gelu', but a 'llama' uses 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "F16", "rope_type is"),
        ({"rope_parameters": _YARN | {"beta_fast": 2.0}}, "F16", "yarn has beta_fast"),
        ({"rope_parameters": _YARN | {"attention_factor": 1.5}}, "F16", "attention_factor or"),
        (
            {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "F16",
            "mscale of its own",
        ),
        ({}, "F16", "has no tokenizer.json and no tokenizer.model"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused_and_nothing_written(
    changes, file_type, message, tmp_path
):
    with pytest.raises(ValueError, match=message) as error:
        save_gguf(tmp_path / "out.gguf", checkpoint(**changes), file_type)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_fails_leaves_nothing_behind(tmp_path):
    broken = open_checkpoint(shared_path("vectors/llama/hf"))
    parts = dict(vars(broken)) | {"read": lambda name: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        save_gguf(tmp_path / "out.gguf", Checkpoint(**parts), "F16", tokenizer=False)
    assert not list(tmp_path.iterdir())


def test_tokens_beside_a_sentencepiece_model_go_into_the_file():
    model = shared_path("data/tokenizers/llama2/tokenizer.model").read_bytes()
    files = {
        "tokenizer.model": model,
        "added_tokens.json": json.dumps({"[PAD]": 32000, "<|im|>": 32001}).encode(),
        "tokenizer_config.json": b'{"pad_token": "[PAD]", "eos_token": "</s>"}',
    }
    words = from_files(files, 32003)
    assert words.tokens[32000:] == ["[PAD]", "<|im|>", "[PAD32002]"]
    assert words.special["padding"] == 32000
    there = tokenizer_from_files(files)
    back = tokenizer_from_files(tokenizer_files(from_metadata(vocabulary_metadata(words))))
    for text in ("a <|im|> b", "Hello [PAD]"):
        assert back.encode(text) == there.encode(text)
        assert back.encode(text, special=True) == there.encode(text, special=True)


def test_several_files_in_a_folder(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, a.gguf and others: give one"):
        open_checkpoint(tmp_path)
