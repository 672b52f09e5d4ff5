"""`QuantizedTensor` as a pytree: jit, vmap, scan, sharding and Orbax; honest sizes; bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import qlora_jax as ql
from pallas_kernels import CODEBOOKS

NF4 = ql.QuantConfig()


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (NF4, 4.127),
        (ql.QuantConfig(double_quant=False), 4.5),
        (ql.QuantConfig(blocksize=32), 4.254),
        (ql.QuantConfig("int8"), 8.127),
    ],
)
def test_bits_per_weight(config: ql.QuantConfig, bits: float) -> None:
    tensor = jax.eval_shape(lambda w: ql.quantize(w, config), jnp.zeros((4096, 4096)))
    assert round(tensor.bits_per_weight, 3) == bits


def test_nbytes_counts_every_leaf() -> None:
    tensor = ql.quantize(normal(128, 256))
    assert tensor.nbytes == 128 * 128 + 512 + 2 * 4 + 4


def test_shapes_and_repr() -> None:
    tensor = ql.quantize(normal(48, 64, dtype=jnp.bfloat16))
    assert tensor.codes.shape == (48, 32)
    assert tensor.shape == (48, 64)
    assert tensor.dequantize().dtype == jnp.bfloat16
    assert tensor.dequantize(jnp.float16).dtype == jnp.float16
    with pytest.raises(ValueError, match="dtype is 'bf16'; expected bfloat16, float16"):
        tensor.dequantize("bf16")
    assert repr(tensor) == "QuantizedTensor([48, 64] bfloat16: nf4 blocksize=64 double_quant)"


def test_jit_and_tree() -> None:
    tensor = ql.quantize(normal(32, 64))
    same = jax.jit(lambda t: jax.tree.map(lambda leaf: leaf, t))(tensor)
    np.testing.assert_array_equal(same.dequantize(), tensor.dequantize())
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tensor)]
    assert names == [".codes", ".absmax", ".nested_absmax", ".offset"]


def test_stack_by_vmap_is_sliced_by_scan() -> None:
    weights = normal(3, 32, 64)
    stack = jax.vmap(ql.quantize)(weights)
    assert stack.shape == (32, 64)
    assert stack.stack_shape == (3,)
    assert stack.dequantize().shape == (3, 32, 64)
    _, scanned = jax.lax.scan(lambda c, t: (c, t.dequantize()), None, stack)
    for weight, layer, whole in zip(weights, scanned, stack.dequantize(), strict=True):
        np.testing.assert_array_equal(layer, whole)
        np.testing.assert_array_equal(layer, ql.quantize(weight).dequantize())


def test_a_stack_is_indexed_by_its_own_axes() -> None:
    weights = normal(2, 3, 8, 64)
    stack = jax.vmap(jax.vmap(ql.quantize))(weights)
    assert stack[...] is stack
    whole = np.asarray(stack.dequantize())
    for index in (1, -1, (0, 2), np.s_[0, ::2], [1, 0]):
        np.testing.assert_array_equal(stack[index].dequantize(), whole[index])
    np.testing.assert_array_equal(stack[..., 0].dequantize(), whole[:, 0])
    assert len(list(stack)) == 2
    for tensor, index in ((stack, 2), (stack, (0, 0, 0)), (stack[0, 0], 0)):
        with pytest.raises(IndexError, match=r"only the axes of its stack, .* dequantize first"):
            tensor[index]


@pytest.mark.parametrize("convert", [np.asarray, np.square, jnp.asarray])
def test_codes_are_not_taken_for_numbers(convert) -> None:
    with pytest.raises(TypeError, match=r"holds codes: take .* dequantize\(\)"):
        convert(ql.quantize(normal(3, 64)))


def test_rows_are_sharded_over_a_mesh() -> None:
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    tensor, x = ql.quantize(normal(64, 128)), normal(4, 128, seed=1)
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    sharded = ql.QuantizedTensor(
        jax.device_put(tensor.codes, rows),
        jax.device_put(tensor.absmax, rows),
        jax.device_put(tensor.nested_absmax, everywhere),
        jax.device_put(tensor.offset, everywhere),
        shape=tensor.shape,
        dtype=tensor.dtype,
    )
    y = jax.jit(ql.quantized_matmul)(x, sharded)
    np.testing.assert_allclose(y, ql.quantized_matmul(x, tensor), rtol=1e-5, atol=1e-5)


def test_orbax_round_trip(tmp_path: Path) -> None:
    tensor = ql.quantize(normal(32, 64))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tensor", {"w": tensor})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "tensor", {"w": tensor})["w"]
    np.testing.assert_array_equal(restored.codes, tensor.codes)
    np.testing.assert_array_equal(restored.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (np.zeros((2, 2), np.int32), TypeError, "int32"),
        (np.zeros((0, 4), np.float32), ValueError, "at least one element"),
        (np.float32(1), ValueError, "at least one element"),
        (np.zeros((2, 2)), TypeError, "weight is float64; quantize takes"),
        ([[1.0, 2.0]], TypeError, "weight is of type list; quantize takes"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_weights(weight, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ql.quantize(weight)


def test_64_bits_are_not_narrowed_unasked() -> None:
    with jax.enable_x64(True), pytest.raises(TypeError, match="weight is float64; quantize takes"):
        ql.quantize(np.zeros((2, 2)))


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_config() -> None:
    with pytest.raises(ValueError, match=f"nf5.*{', '.join(CODEBOOKS)}"):
        ql.QuantConfig("nf5")
    with pytest.raises(ValueError, match=r"blocksize is 48; choose one of 32, 64"):
        ql.QuantConfig(blocksize=48)
    with pytest.raises(ValueError, match=r"blocksize is 64\.0; choose"):
        ql.QuantConfig(blocksize=64.0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("as_users_run_it")
def test_the_name_of_a_data_type_is_no_config() -> None:
    with pytest.raises(TypeError, match=r"config is 'nf4'; give a QuantConfig, such as"):
        ql.quantize(normal(2, 64), "nf4")  # type: ignore[arg-type]


def test_matmul_refuses_stacks_and_misfits() -> None:
    stack = jax.vmap(ql.quantize)(normal(2, 32, 64))
    with pytest.raises(ValueError, match="one matrix"):
        ql.quantized_matmul(normal(4, 64), stack)
    flat = ql.quantize(normal(32, 64))
    with pytest.raises(ValueError, match="64 inputs"):
        ql.quantized_matmul(normal(4, 32), flat)
    leaves = (flat.codes.reshape(4, 8, 32), flat.absmax, flat.nested_absmax, flat.offset)
    with pytest.raises(ValueError, match="one matrix"):
        ql.quantized_matmul(
            normal(4, 64), ql.QuantizedTensor(*leaves, shape=(4, 8, 64), dtype=flat.dtype)
        )


@pytest.mark.usefixtures("as_users_run_it")
def test_matmul_names_an_argument_of_another_kind() -> None:
    w = ql.quantize(normal(32, 64))
    with pytest.raises(TypeError, match=r"w is of type .*; expected a QuantizedTensor"):
        ql.quantized_matmul(normal(4, 64), normal(32, 64))
    with pytest.raises(TypeError, match="x is of type list; expected an array"):
        ql.quantized_matmul([[1.0] * 64], w)
    with pytest.raises(ValueError, match=r"x has shape \(\), but w takes 64 inputs"):
        ql.quantized_matmul(jnp.float32(1), w)


def test_a_layer_that_the_stack_has_not() -> None:
    stack = jax.vmap(ql.quantize)(normal(2, 32, 64))
    with pytest.raises(ValueError, match="layer is 2; expected 0 to 1"):
        ql.quantized_matmul(normal(4, 64), stack.at_layer(jnp.int32(2)))
    with pytest.raises(ValueError, match="layer is 2; expected 0 to 1"):
        stack.at_layer(jnp.int32(2)).dequantize()
