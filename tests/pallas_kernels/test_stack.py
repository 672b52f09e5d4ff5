"""One weight of a stack, multiplied with where it lies: to the bit as taken out of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Layout, TritonConfig, nf4_gemv, nf4_matmul, reads_layers
from tests.pallas_kernels.base import activations, adapter, cases, dtypes, make_case

LAYERS = 3
WAYS = [{"implementation": "xla"}, {"implementation": "triton", "interpret": True}]


def stacked(case):
    """The case and two of other bytes and scales: (the stacks, the weights one by one)."""
    rng = np.random.default_rng(0)
    others = [
        dataclasses.replace(
            case,
            codes=rng.permutation(case.codes, axis=-1),
            absmax=rng.permutation(case.absmax),
            offset=None if case.offset is None else case.offset + np.float32(shift),
        )
        for shift in (1, 2)
    ]
    weights = [other.arrays for other in (case, *others)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *weights), weights


@settings(max_examples=12)
@given(
    case=cases(whole_rows=True),
    rows=st.sampled_from([1, 4, 7, 20]),
    dtype=dtypes,
    rank=st.sampled_from([0, 5]),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["implementation"])
def test_a_layer_is_as_its_weight_alone(way, case, rows, dtype, rank, seed):
    stack, weights = stacked(case)
    x = activations(seed, rows, case.k, dtype)
    beside = {
        "bias": activations(seed, 1, case.n, dtype)[0],
        "lora": adapter(seed, rows, case.n, rank, dtype) if rank else None,
    }
    run = functools.partial(nf4_matmul, x, **beside, **case.keywords, **way)
    for layer in range(LAYERS):
        got = run(*stack, layer=jnp.int32(layer))
        assert np.array_equal(got, run(*weights[layer]), equal_nan=True)


@pytest.mark.parametrize(
    "config",
    [
        TritonConfig(16, 32, 64, split_k=2),
        TritonConfig(1, 1, 1024, decoder="table", fused=False),
    ],
    ids=["sum split", "dequantized first"],
)
def test_other_ways_to_cut_the_work(config):
    stack, weights = stacked(make_case(0, 48, 256))
    run = functools.partial(
        nf4_matmul, activations(0, 20, 256, "float32"), config=config, **WAYS[1]
    )
    got = run(*stack, layer=jnp.int32(2))
    np.testing.assert_array_equal(got, run(*weights[2]))


def test_a_loop_over_layers_and_its_vmap():
    case = make_case(0, 64, 64)
    stack, weights = stacked(case)

    def through(x, ways):
        def step(x, layer):
            return nf4_gemv(x, *stack, layer=layer, **ways), None

        return jax.lax.scan(step, x, jnp.arange(LAYERS))[0]

    x = activations(0, 8, 64, "float32").reshape(2, 4, 64)
    want = x
    for weight in weights:
        want = nf4_gemv(want, *weight, **WAYS[1])  # all rows at once, as the map has them
    got = jax.jit(jax.vmap(lambda x: through(x, WAYS[1])))(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("of_x", "of_w"), [("data", "data"), (None, "data"), ("data", None), (None, None)]
)
def test_on_several_devices(of_x, of_w):
    """Cut by rows, whatever the layer: stacks as `qlora_jax.models.spread` lays them out."""
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def at(array, *entries):
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.P(*entries)))

    stack, weights = stacked(make_case(0, 512, 256))
    codes, absmax, nested, offset = stack
    there = (at(codes, None, of_w), at(absmax, None, of_w), at(nested), at(offset))
    x = activations(0, 4, 256, "float32")
    run = jax.jit(functools.partial(nf4_matmul, **WAYS[1]))
    for layer in range(LAYERS):
        got = run(at(x, of_x), *there, layer=jnp.int32(layer))
        np.testing.assert_allclose(got, run(x, *weights[layer]), rtol=1e-5, atol=1e-4)


def test_which_kernels_read_layers():
    """Those that are lowered by Triton, for few rows, in stacks in which it finds an element; and
    the Hopper gemv before jax 0.11, where XLA copies what it slices."""
    layout = Layout((4096, 4096), "nf4", 64, double_quant=True)

    def on(kind, rows=1, layers=32, **ask):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pallas_kernels.dispatch.target", lambda: kind)
            return reads_layers(rows, layout, layers, **ask)

    assert on("NVIDIA L40")
    assert on("NVIDIA L40", rows=16)
    assert not on("NVIDIA L40", rows=17)
    assert not on("NVIDIA L40", layers=256)  # 2 GiB: too much for signed 32 bits
    assert not on("NVIDIA L40", layers=512)  # as much as unsigned 32 bits count
    assert on("NVIDIA L40", layers=513)  # more than 4 GiB: it takes 64 bits
    assert not on("NVIDIA L40", implementation="xla")
    assert on("NVIDIA H200") == (jax.__version_info__ < (0, 11))
    assert not on("NVIDIA H200", rows=17)
    assert on("NVIDIA H200", implementation="triton")
    assert not on("cpu")


def test_a_stack_without_a_layer_is_refused():
    stack, _ = stacked(make_case(0, 32, 64))
    x = activations(0, 1, 64, "float32")
    with pytest.raises(
        ValueError, match=r"codes has shape \(3, 32, 32\), 3072 bytes; expected 102"
    ):
        nf4_matmul(x, *stack, shape=(32, 64))
