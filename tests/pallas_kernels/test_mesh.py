"""Ops on several devices: each device runs the kernel on its own part, and the parts are the whole.

What a device is given is read from the compiled program: which arrays are gathered, and how large
the parts are that are computed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import Layout, nf4_dequantize, nf4_matmul, nf4_matmul_transposed
from pallas_kernels._mesh import _is_less_to_send
from tests.pallas_kernels.base import ROUNDOFF, make_case

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def mesh_of(kind, **axes):
    """Four devices, their axes all of one kind."""
    kinds = (kind,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), kinds, devices=jax.devices()[:4])


LINE, GRID = mesh_of(AUTO, data=4), mesh_of(AUTO, data=2, model=2)
TYPED_LINE, TYPED_GRID = mesh_of(EXPLICIT, data=4), mesh_of(EXPLICIT, data=2, model=2)
INTERPRETED = {"implementation": "triton", "interpret": True}
N, K, RANK = 512, 256, 8
CASE = make_case(0, N, K)
"""512 × 4 absmax: 8 nested blocks, two for each of four devices."""

# placement -> mesh, what rows of x are cut along, what rows of W are cut along
PLACEMENTS = {
    "data parallel": (LINE, "data", None),
    "fully sharded": (LINE, "data", "data"),
    "tensor parallel": (LINE, None, "data"),
    "both": (GRID, "data", "model"),
    "both on one axis": (GRID, ("data", "model"), "model"),
    "data parallel, in types": (TYPED_LINE, "data", None),
    "fully sharded, in types": (TYPED_LINE, "data", "data"),
    "tensor parallel, in types": (TYPED_LINE, None, "data"),
    "both, in types": (TYPED_GRID, "data", "model"),
    "both on one axis, in types": (TYPED_GRID, ("data", "model"), "model"),
}
GATHERS_W = {name for name in PLACEMENTS if name.startswith(("fully sharded", "both on one axis"))}


def forward(x, dy, w, bias, lora):
    return nf4_matmul(x, *w, bias=bias, lora=lora, fuse_lora=True, **INTERPRETED)


def unfused(x, dy, w, bias, lora):
    return nf4_matmul(x, *w, bias=bias, lora=lora, fuse_lora=False, **INTERPRETED)


def transposed(x, dy, w, bias, lora):
    return nf4_matmul_transposed(dy, *w, **INTERPRETED)


def dequantize(x, dy, w, bias, lora):
    return nf4_dequantize(*w, dtype=jnp.float32, **INTERPRETED)


def arguments(rows, seed=1):
    """x, dy [8, rows/8, ·], a weight, a bias and an adapter."""
    rng = np.random.default_rng(seed)
    batch = (8, rows // 8)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    lora = (draw((*batch, RANK)), draw((N, RANK)))
    return draw((*batch, K)), draw((*batch, N)), CASE.arrays, draw(N), lora


def placed(args, mesh, rows, weight_rows):
    """The arguments on the mesh; nested absmax and offset whole, as `spread` leaves them."""

    def at(array, *entries):
        spec = jax.sharding.PartitionSpec(*entries)
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))

    x, dy, (codes, absmax, nested, offset), bias, (xa, b) = args
    weight = (at(codes, weight_rows), at(absmax, weight_rows), at(nested), at(offset))
    lora = at(xa, rows), at(b, weight_rows)
    return at(x, rows), at(dy, rows), weight, at(bias, weight_rows), lora


def collectives(hlo):
    """(operation, dtype, shape) of each exchange between devices."""
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-[a-z]+|collective-permute)\(", hlo)
    return {(op, dtype, tuple(map(int, shape.split(",")))) for dtype, shape, op in found}


@functools.cache
def ran(op, placement):
    """(arguments, result, exchanges between devices) of 64 rows."""
    args = arguments(64)
    mesh, rows, weight_rows = PLACEMENTS[placement]
    there = placed(args, mesh, rows, weight_rows)
    compiled = jax.jit(op).lower(*there).compile()
    return args, compiled(*there), collectives(compiled.as_text())


def exact(op, args):
    """float64 of the result, and of the sums of its terms' magnitudes."""
    x, dy, _, bias, lora = (jax.tree.map(lambda a: np.asarray(a, np.float64), a) for a in args)
    w = CASE.weight.astype(np.float64)
    if op is dequantize:
        return w, np.zeros_like(w)
    if op is transposed:
        return dy @ w, np.abs(dy) @ np.abs(w)
    size = np.abs(x) @ np.abs(w).T + np.abs(lora[0]) @ np.abs(lora[1]).T + np.abs(bias)
    return x @ w.T + lora[0] @ lora[1].T + bias, size


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("op", [forward, unfused, transposed, dequantize])
def test_parts_make_the_whole(op, placement):
    args, result, _ = ran(op, placement)
    want, size = exact(op, args)
    assert np.all(np.abs(np.asarray(result) - want) <= 8 * ROUNDOFF["float32"] * size)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_packed_weights_are_gathered(placement):
    _, _, exchanges = ran(forward, placement)
    codes, absmax = CASE.codes.shape, CASE.absmax.shape
    gathered = {shape for op, dtype, shape in exchanges if op == "all-gather" and dtype == "u8"}
    assert gathered == ({codes, absmax} if placement in GATHERS_W else set())
    # Neither x, nor W in more than four bits, is sent anywhere.
    sent = {shape for _, dtype, shape in exchanges if dtype == "f32"}
    assert not sent & {(8, 8, K), (N, K)}


def test_results_lie_where_rows_lie():
    for placement in ("data parallel", "fully sharded", "both", "fully sharded, in types"):
        for op in (forward, transposed):
            _, result, _ = ran(op, placement)
            assert result.sharding.spec[0] == "data"
            assert (
                result.addressable_shards[0].data.shape[0]
                == 8 // result.sharding.mesh.shape["data"]
            )


def test_sums_over_the_rows_of_a_cut_weight_are_added():
    for placement, rows in (("tensor parallel", 8), ("both", 4)):
        _, _, exchanges = ran(transposed, placement)
        assert exchanges == {("all-reduce", "f32", (rows, 8, K))}


@pytest.mark.parametrize("op", [forward, unfused, transposed])
def test_inside_shard_map(op):
    args, cut, whole = arguments(64), jax.P("data"), jax.P()
    given = (cut, cut, whole, whole, (cut, whole))

    def rows_of_one(*args):
        result = op(*args)
        assert jax.typeof(result).manual_axis_type.varying == {"data"}
        return result

    # What differs nowhere says so as well, or its sum over devices would count it four times.
    jax.eval_shape(jax.shard_map(rows_of_one, mesh=LINE, in_specs=given, out_specs=cut), *args)
    jax.eval_shape(jax.shard_map(op, mesh=LINE, in_specs=whole, out_specs=whole), *args)
    # Pallas' interpreter itself does not keep to these types.
    run = jax.shard_map(op, mesh=LINE, in_specs=given, out_specs=cut, check_vma=False)
    want, size = exact(op, args)
    assert np.all(np.abs(np.asarray(jax.jit(run)(*args)) - want) <= 8 * ROUNDOFF["float32"] * size)


def test_a_part_of_a_sum_over_devices_is_no_operand():
    def partial(x, w):
        part = jax.lax.pcast(jax.lax.pcast(x, "data", to="varying"), "data", to="unreduced")
        return nf4_matmul(part, *w, **INTERPRETED)

    run = jax.shard_map(partial, mesh=LINE, in_specs=jax.P(), out_specs=jax.P())
    with pytest.raises(ValueError, match=r"part of a sum over devices: jax\.lax\.psum it"):
        jax.eval_shape(run, np.zeros((8, K), np.float32), CASE.arrays)


def test_a_single_row_does_not_gather_the_weight():
    x, dy, w, bias, lora = arguments(8)
    args = (x[:1], dy[:1], w, bias, (lora[0][:1], lora[1]))
    there = placed(args, LINE, None, "data")
    compiled = jax.jit(forward).lower(*there).compile()
    assert collectives(compiled.as_text()) == {("all-gather", "f32", (1, 1, N))}
    want, size = exact(forward, args)
    error = np.abs(np.asarray(compiled(*there)) - want)
    assert np.all(error <= 8 * ROUNDOFF["float32"] * size)


def test_few_rows_are_gathered_instead_of_the_weight():
    """Four texts on four devices, a token each: all of x is less than a packed weight."""
    x, dy, w, bias, lora = arguments(8)
    args = (x[:4], dy[:4], w, bias, (lora[0][:4], lora[1]))
    there = placed(args, LINE, "data", "data")
    for op in (forward, transposed):
        compiled = jax.jit(op).lower(*there).compile()
        assert not {dtype for _, dtype, _ in collectives(compiled.as_text())} & {"u8"}
        result = compiled(*there)
        want, size = exact(op, args)
        assert np.all(np.abs(np.asarray(result) - want) <= 8 * ROUNDOFF["float32"] * size)


def test_x_is_less_to_send_up_to_so_many_rows():
    """21 · (512 + 256) · 4 bytes of x and y are less than the 64 KiB of codes."""
    layout = Layout((N, K), "nf4", 64, double_quant=True)
    for rows, less in ((21, True), (22, False)):
        x = jax.ShapeDtypeStruct((rows, K), jnp.float32)
        assert _is_less_to_send(layout, x) == less


@st.composite
def cut_cases(draw):
    """Weights whose rows divide by four, but whose parts are not always weights again."""
    blocksize = draw(st.sampled_from([32, 64, 128]))
    return make_case(
        seed=draw(st.integers(0, 2**16)),
        n=4 * draw(st.integers(1, 40)),
        k=blocksize * draw(st.sampled_from([1, 2, 3, 8])),
        quant_type=draw(st.sampled_from(["nf4", "fp4", "int4"])),
        blocksize=blocksize,
        double_quant=draw(st.booleans()),
    )


@settings(max_examples=12)
@example(case=make_case(0, 128, 256), rows=None, tokens=3)  # two nested blocks for four devices
@given(case=cut_cases(), rows=st.sampled_from([None, "data"]), tokens=st.sampled_from([1, 3, 5]))
def test_any_weight_placed_by_rows(case, rows, tokens):
    """Where nested blocks would cross parts, every device takes the whole weight."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((4, tokens, case.k), dtype=np.float32)
    by_rows = jax.sharding.NamedSharding(LINE, jax.sharding.PartitionSpec("data"))
    codes, absmax, nested, offset = case.arrays
    if absmax.size % 4 == 0:
        absmax = jax.device_put(absmax, by_rows)
    if rows:
        x = jax.device_put(x, by_rows)
    weight = (jax.device_put(codes, by_rows), absmax, nested, offset)
    y = jax.jit(functools.partial(nf4_matmul, **case.keywords, **INTERPRETED))(x, *weight)
    want = np.asarray(x, np.float64) @ case.weight.astype(np.float64).T
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(case.weight.astype(np.float64)).T
    assert np.all(np.abs(np.asarray(y) - want) <= 8 * ROUNDOFF["float32"] * size)


def test_vmap_over_weights():
    """Not cut, but right."""
    args = placed(arguments(64), LINE, "data", "data")
    x, _, weight, *_ = args
    stacked = tuple(jnp.stack([part, part]) for part in weight)
    y = jax.jit(jax.vmap(lambda *w: nf4_matmul(x, *w, **INTERPRETED)))(*stacked)
    want = np.asarray(x, np.float64) @ CASE.weight.astype(np.float64).T
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(CASE.weight.astype(np.float64)).T
    assert np.all(np.abs(np.asarray(y) - want) <= 8 * ROUNDOFF["float32"] * size)


def test_eager_calls_are_cut_too():
    x, _, weight, *_ = placed(arguments(64), LINE, "data", None)
    y = nf4_matmul(x, *weight, **INTERPRETED)
    assert y.addressable_shards[0].data.shape == (2, 8, N)
