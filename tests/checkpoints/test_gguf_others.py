"""GGUF files that others wrote: keys that are absent, tokenizers by name, tensors nobody knows."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from qlora_jax.checkpoints import (
    Checkpoint,
    TensorInfo,
    check_shapes,
    open_checkpoint,
    open_gguf,
    save_gguf,
)
from qlora_jax.checkpoints.gguf.hyperparameters import to_config, to_metadata
from qlora_jax.checkpoints.gguf.rope import ROPE_FACTORS
from qlora_jax.checkpoints.gguf.vocabulary import (
    Vocabulary,
    from_files,
    from_metadata,
    tokenizer_files,
)
from qlora_jax.checkpoints.gguf.vocabulary import to_metadata as vocabulary_metadata
from qlora_jax.models import FAMILIES
from tests.shared import shared_path

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def written(**changes) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and tensors of a model with this config.json."""
    family = FAMILIES[(CONFIG | changes)["model_type"]]
    config = family.write_config(family.read_config(CONFIG | changes))
    metadata, tensors = to_metadata(config)
    return metadata | {"general.architecture": family.model_type}, tensors


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        _YARN,
        # Llama 3.1's and 3.2's; in heads of 128 a pair lies on the ramp.
        _LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
        _LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
        _LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 1024},
    ],
)
def test_a_scaled_rope_comes_back(scaling):
    metadata, tensors = written(rope_scaling=scaling, rope_theta=5e5)
    config = to_config(metadata, {}, tensors.get(ROPE_FACTORS))
    read = FAMILIES["llama"].read_config
    assert read(config).rope == read(CONFIG | {"rope_scaling": scaling, "rope_theta": 5e5}).rope


def test_a_part_of_a_head_that_is_turned_comes_back():
    """Phi-4-mini's; and what a scaling says besides."""
    for scaling in (None, {"rope_type": "linear", "factor": 2.0}):
        given = {"model_type": "phi3", "partial_rotary_factor": 0.75, "rope_scaling": scaling}
        metadata, _ = written(**given)
        assert metadata["phi3.rope.dimension_count"] == 96
        read = FAMILIES["phi3"].read_config
        assert read(to_config(metadata, {}, None)).rope == read(CONFIG | given).rope


def test_keys_that_old_files_lack():
    """The embedding tells the vocabulary's size, the turned coordinates a head's width."""
    metadata, _ = written(head_dim=64)
    for key in ("vocab_size", "attention.key_length", "attention.value_length", "rope.freq_base"):
        del metadata[f"llama.{key}"]
    ids = {f"tokenizer.ggml.{role}_token_id": i for i, role in enumerate(("bos", "eos"), 5)}
    config = to_config(metadata | ids, {"token_embd.weight": (48, 512)}, None)
    found = {name: config[name] for name in ("vocab_size", "head_dim", "rope_theta")}
    assert found == {"vocab_size": 48, "head_dim": 64, "rope_theta": 1e4}
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, 6)
    del metadata["llama.block_count"]
    with pytest.raises(ValueError, match=r"has no 'llama\.block_count', which its architecture"):
        to_config(metadata, {}, None)


def test_ropes_that_are_not_read():
    metadata, _ = written()
    with pytest.raises(ValueError, match="scales its rope by 'longrope', which is not read"):
        to_config(metadata | {"llama.rope.scaling.type": "longrope"}, {}, None)
    factors = written(rope_scaling=_LLAMA3 | {"factor": 8.0})[1][ROPE_FACTORS]
    # Of a head half as wide, and with a frequency that no release has.
    for strange in (factors[:32], np.where(np.arange(64) == 40, 3.0, factors)):
        with pytest.raises(ValueError, match="follow no release of Llama 3"):
            to_config(metadata, {}, strange)


def file_of(path: Path, keys: dict[str, int], tensors: dict[str, np.ndarray]) -> Path:
    """A file as the gguf package writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata, _ = written(hidden_size=32, num_attention_heads=1, num_key_value_heads=1)
    for key, value in (metadata | keys).items():
        if key == "general.architecture":
            continue
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else None
        writer.add_key_value(key, value, kind or gguf.GGUFValueType.UINT32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_that_are_not_read(tmp_path):
    plain = {"token_embd.weight": np.zeros((32, 32), np.float16)}
    assert open_gguf(file_of(tmp_path / "a.gguf", {}, plain)).config["torch_dtype"] == "float16"
    with pytest.raises(ValueError, match="is one of 3 parts: join them first"):
        open_gguf(file_of(tmp_path / "b.gguf", {"split.count": 3}, plain))
    whole = {"blk.0.attn_q.weight": np.zeros((32, 32), np.int32)}
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_q\.weight' is stored as I32, which the"):
        open_gguf(file_of(tmp_path / "c.gguf", {}, plain | whole))
    strange = open_gguf(
        file_of(tmp_path / "d.gguf", {}, plain | {"nobodys.weight": np.ones(2, np.float32)})
    )
    with pytest.raises(ValueError, match=r"tensor 'nobodys\.weight'"):
        check_shapes(strange)


def test_what_lies_beside_a_file_stands_for_what_it_says(tmp_path):
    plain = {"token_embd.weight": np.zeros((32, 32), np.float16)}
    file_of(tmp_path / "a.gguf", {}, plain)
    config = CONFIG | {"rope_theta": 5.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = open_checkpoint(tmp_path)
    assert found.config == config
    assert found.companions() == files


def test_a_tensor_without_a_name_there(tmp_path):
    tensors = {"model.layers.0.adapter.weight": TensorInfo((2, 2), "F32")}
    made = Checkpoint(Path("made"), CONFIG, tensors, lambda name: pytest.fail(name))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.adapter\.weight' has no name in"):
        save_gguf(tmp_path / "out.gguf", made, tokenizer=False)


def test_what_llama_cpp_makes_itself_is_not_written(tmp_path):
    """A tied head, and buffers of old checkpoints."""
    shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (32, 512))
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (64,)
    tensors = {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}
    config = CONFIG | {"tie_word_embeddings": True}
    made = Checkpoint(Path("old"), config, tensors, lambda name: np.zeros(shapes[name]))
    save_gguf(tmp_path / "out.gguf", made, "F32", tokenizer=False)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert [tensor.name for tensor in reader.tensors] == ["token_embd.weight"]
    assert reader.fields["general.name"].contents() == "old"


# --- tokenizers ---


@pytest.mark.parametrize("name", ["llama2", "mistral-v0.1"])
def test_both_files_of_a_tokenizer_say_the_same(name):
    """The scores differ, and may: only their order counts."""
    folder = shared_path(f"data/tokenizers/{name}")
    one, other = (
        from_files({file: (folder / file).read_bytes()}, 32002)
        for file in ("tokenizer.json", "tokenizer.model")
    )
    for words in (one, other):
        assert (words.types[32000], words.scores[32000]) == (5, -1000.0)  # unused
    same = ("model", "pre", "tokens", "types", "add_space_prefix")
    for part in same:
        assert getattr(one, part) == getattr(other, part), part


def _words(**changes) -> Vocabulary:
    tokens = ["<s>", "a", "b", "1", "ab", "Ġ"]
    types = [3, *[1] * (len(tokens) - 1)]
    return replace(Vocabulary("gpt2", "llama-bpe", tokens, types, special={"bos": 0}), **changes)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["it", "'S", "Ġa", "123", "4", "!?"]),
        ("qwen2", ["it", "'S", "Ġa", "1", "2", "3", "4", "!?"]),
        ("smollm", ["it", "'", "S", "Ġa", "1", "2", "3", "4", "!?"]),
        ("gpt-2", ["it", "'", "S", "Ġa", "1234", "!?"]),
    ],
)
def test_rules_by_their_names(pre, pieces):
    spec = tokenizer_files(_words(pre=pre))["tokenizer.json"].decode()
    cut = tokenizers.Tokenizer.from_str(spec)
    assert [piece for piece, _ in cut.pre_tokenizer.pre_tokenize_str("it'S a1234!?")] == pieces
    # Llama 3 looks whole words up before it merges.
    assert cut.encode("ab", add_special_tokens=False).ids == ([4] if pre == "llama-bpe" else [1, 2])


def test_what_a_tokenizer_says_besides():
    words = _words(add_bos=True, add_eos=True, chat_template="{{ messages }}")
    metadata = vocabulary_metadata(words)
    assert from_metadata(metadata) == words
    config = json.loads(tokenizer_files(words)["tokenizer_config.json"])
    given = {"tokenizer_config.json": json.dumps(config).encode()}
    spec = json.loads(tokenizer_files(words)["tokenizer.json"])
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 6, "content": "<u>"})
    spec["added_tokens"][1]["special"] = False
    given["tokenizer.json"] = json.dumps(spec).encode()
    read = from_files(given, 8)
    assert read.types == [*words.types, 4, 5]  # one of the user's, one unused
    assert (read.add_bos, read.add_eos, read.chat_template) == (True, True, "{{ messages }}")
    given["chat_template.jinja"] = b"{{ bos_token }}"
    assert from_files(given, 8).chat_template == "{{ bos_token }}"
    with pytest.raises(ValueError, match="tokenizer has 7 tokens, but the model's embedding 6"):
        from_files(given, 6)


def test_keys_of_a_tokenizer_that_old_files_lack():
    for model, adds in (("llama", True), ("gpt2", False)):
        keys = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["a", "b"]}
        words = from_metadata(keys)
        assert (words.add_bos, words.add_space_prefix, words.types) == (adds, adds, [1, 1])
    for said, adds in (({}, True), ({"tokenizer.ggml.add_bos_token": False}, False)):
        words = from_metadata(keys | {"tokenizer.ggml.pre": "llama-bpe"} | said)
        assert (words.add_bos, words.add_space_prefix) == (adds, False)


def test_tokenizers_that_are_not_read_or_written():
    with pytest.raises(ValueError, match="tokenizer is 'bert', but of GGUF tokenizers gpt2 and"):
        from_metadata({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(ValueError, match="cuts texts by the rule 'tekken', which is none of gpt-2"):
        tokenizer_files(_words(pre="tekken"))
    spec = {"model": {"type": "WordPiece", "vocab": {"a": 0}}}
    with pytest.raises(ValueError, match="tokenizer is a WordPiece, but GGUF files are written"):
        from_files({"tokenizer.json": json.dumps(spec).encode()}, 1)
    spec = json.loads(tokenizer_files(_words())["tokenizer.json"])
    spec["pre_tokenizer"]["pretokenizers"].pop(0)
    with pytest.raises(ValueError, match=r"a rule that is none of .*, and llama\.cpp needs its"):
        from_files({"tokenizer.json": json.dumps(spec).encode()}, 6)


def test_a_space_in_front_in_either_style():
    vocab = {piece: token for token, piece in enumerate(("<unk>", "▁", "a", "▁a"))}
    model = {"type": "BPE", "vocab": vocab, "merges": ["▁ a"], "unk_token": "<unk>"}
    for scheme in ("first", "always", "never"):
        cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}
        spec = {"version": "1.0", "pre_tokenizer": cut, "model": model | {"byte_fallback": True}}
        words = from_files({"tokenizer.json": json.dumps(spec).encode()}, 4)
        assert words.add_space_prefix == (scheme != "never")
        assert (words.types, words.scores) == ([2, 1, 1, 1], [-1.0, -1.0, -1.0, 0.0])
