import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_jax.checkpoints import Checkpoint, WeightFolder
from qlora_jax.checkpoints.open import _beside, read_companions

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def write_sharded(folder, weight_map=None):
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"model-{name}.safetensors")
    weight_map = weight_map or {name: f"model-{name}.safetensors" for name in TENSORS}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_single_and_sharded_read_alike(tmp_path):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    single.mkdir()
    sharded.mkdir()
    save_file(TENSORS, single / "model.safetensors")
    write_sharded(sharded)
    for folder in (WeightFolder(single), WeightFolder(sharded)):
        assert folder.shapes == {"a": (2, 3), "b": (4,)}
        assert sorted(folder) == ["a", "b"]
        assert "a" in folder
        assert "c" not in folder
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(folder.read(name), tensor)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    """In every process alike, whatever the order of the index: so they read fastest."""
    # The wider ones lie first in the file.
    tensors = {
        name: np.zeros(3, np.float64 if name > "f" else np.float32) for name in "abcdefghijkl"
    }
    save_file(tensors, tmp_path / "model-1.safetensors")
    write_sharded(tmp_path, dict.fromkeys(reversed(tensors), "model-1.safetensors"))
    content = (tmp_path / "model-1.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__", None)
    places = {name: tensor["data_offsets"] for name, tensor in header.items()}
    assert list(WeightFolder(tmp_path)) == sorted(places, key=places.__getitem__)


def test_a_tensor_that_the_index_does_not_name_is_none_of_the_models(tmp_path):
    save_file(TENSORS, tmp_path / "both.safetensors")
    index = {"weight_map": {"a": "both.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(WeightFolder(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    "shard",
    [
        "../model-a.safetensors",
        "/etc/passwd",
        "sub/model-a.safetensors",
        "..\\model-a.safetensors",
        "C:\\model-a.safetensors",
        "..",
        "",
        3,
    ],
)
def test_index_pointing_outside_is_refused(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "model-a.safetensors")
    write_sharded(folder, {"a": shard, "b": "model-b.safetensors"})
    with pytest.raises(ValueError, match=r"not a file of the folder itself"):
        WeightFolder(folder)


def test_missing_shard(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-b.safetensors is missing, but .*lists it"):
        WeightFolder(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_shard(tmp_path, kept):
    write_sharded(tmp_path)
    shard = tmp_path / "model-b.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model-b.safetensors is truncated or no safetensors"):
        WeightFolder(tmp_path)


def test_index_that_promises_more_than_the_shards_hold(tmp_path):
    write_sharded(tmp_path, {"a": "model-a.safetensors", "c": "model-a.safetensors"})
    with pytest.raises(ValueError, match=r"lacks 'c'"):
        WeightFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json"):
        WeightFolder(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        WeightFolder(tmp_path)


def test_no_weights_or_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        WeightFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no folder"):
        WeightFolder(tmp_path / "absent")


def test_small_files_go_where_the_model_goes(tmp_path):
    small = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    }
    for name in small | {"config.json", "training_args.bin", "modeling.py"}:
        (tmp_path / name).write_text(name)
    assert read_companions(tmp_path) == {name: name.encode() for name in small}


def test_a_gguf_keeps_its_tokenizer_unless_one_lies_beside_it(tmp_path):
    own = {"tokenizer.model": b"own"}
    file = Checkpoint(tmp_path / "x.gguf", {}, {}, own.__getitem__, lambda: own)
    (tmp_path / "generation_config.json").write_text("{}")
    assert _beside(tmp_path, file).companions() == own
    (tmp_path / "tokenizer.json").write_text("{}")
    assert _beside(tmp_path, file).companions().keys() == {
        "generation_config.json",
        "tokenizer.json",
    }
