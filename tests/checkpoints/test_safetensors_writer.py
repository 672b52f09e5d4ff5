import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from qlora_jax.checkpoints import WeightFolder
from qlora_jax.checkpoints.safetensors_writer import ShardedWriter, parse_size

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int64]
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60)
@given(TENSORS, st.integers(1, 300))
def test_any_tensors_come_back_aligned_and_in_shards_of_the_size(tmp_path_factory, given, limit):
    folder = tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(0, 9, shape).astype(dtype) for name, (dtype, shape) in given.items()
    }
    with ShardedWriter(folder, list(tensors), limit) as writer:
        for name, tensor in tensors.items():
            writer.add({name: tensor})
    weights = WeightFolder(folder)
    assert set(weights) == set(tensors)
    for name, tensor in tensors.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        np.testing.assert_array_equal(read, tensor)
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="np") as file:
            names = file.keys()
            assert file.metadata() == {"format": "pt"}
            sizes = [tensors[name].nbytes for name in names]
        assert len(sizes) == 1 or sum(sizes) <= limit
        content = shard.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for name in names:
            assert header[name]["data_offsets"][0] % tensors[name].itemsize == 0


def test_a_shard_grows_to_its_size_and_no_further(tmp_path):
    for name, limit, files in (("one", 32, 1), ("two", 16, 2), ("four", 15, 4)):
        (tmp_path / name).mkdir()
        with ShardedWriter(tmp_path / name, list("abcd"), limit) as writer:
            for tensor in "abcd":
                writer.add({tensor: np.zeros(2, np.float32)})
        assert len(list((tmp_path / name).glob("*.safetensors"))) == files


def test_parts_of_one_weight_stay_together_and_the_index_counts_bytes(tmp_path):
    parts = [{f"{n}.a": np.ones(3, np.float32), f"{n}.b": np.ones(5, np.uint8)} for n in range(3)]
    with ShardedWriter(tmp_path, [name for part in parts for name in part], 20) as writer:
        for part in parts:
            writer.add(part)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 17
    for number in range(3):
        names = load_file(tmp_path / f"model-{number + 1:05}-of-00003.safetensors")
        assert set(names) == {f"{number}.a", f"{number}.b"}


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("10kb", 10**4)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "2 parsecs", "0.1"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="is not understood"):
        parse_size(text)
