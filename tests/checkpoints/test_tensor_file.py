"""Tensors are copied out through mappings that serve for many small ones, or for one large one."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_jax.checkpoints import WeightFolder, tensor_file

TENSORS = {f"t{i}": np.full((16, 16), i, np.float32) for i in range(12)}  # 1 KiB each


@pytest.fixture
def opened(monkeypatch):
    """Paths in the order in which they are mapped."""
    paths = []

    def counted(path, **options):
        paths.append(path.name)
        return safe_open(path, **options)

    safe_open = tensor_file.safe_open
    monkeypatch.setattr(tensor_file, "safe_open", counted)
    return paths


@pytest.mark.parametrize(("mapped", "times"), [(2**30, 1), (4 * 2**10, 3), (1, 12)])
def test_a_mapping_serves_for_so_many_bytes(mapped, times, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_MAPPED", mapped)
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = WeightFolder(tmp_path)
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(folder.read(name), expected)
    assert opened == ["model.safetensors"] * times


def test_what_was_read_outlives_its_mapping(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    tensor = tensor_file.TensorFile(path).read("t3")
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(tensor, TENSORS["t3"])
