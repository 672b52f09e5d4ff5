"""Layers trained on four cards: each runs the kernels on its own rows of the batch.

Compiled for four cards of a machine, read from XLA's program: what is exchanged, inside the loop
over layers or before it, and how many rows a kernel is given.
"""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compile_for as harness
from pallas_kernels import in_auto_axes, product_spec
from pallas_kernels.cards import CARDS
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize, quantized_matmul

pytestmark = pytest.mark.skipif(
    not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
)

CARDS_USED, LAYERS, TOKENS = 4, 3, 1024
IN, OUT, RANK = 4096, 11008, 64


def mesh():
    axis = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((CARDS_USED,), ("data",), axis, devices=jax.devices()[:CARDS_USED])


def shape(size, dtype, *entries):
    at = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(size, dtype, sharding=at)


def stack(n, k, cut) -> QuantizedTensor:
    """A stack of weights as `spread` places it."""
    dense = jax.ShapeDtypeStruct((LAYERS, n, k), jnp.bfloat16)
    w = jax.eval_shape(jax.vmap(lambda w: quantize(w, QuantConfig())), dense)
    leaves, treedef = jax.tree.flatten(w)
    entries = [(None, cut), (None, cut), (), ()]  # codes, absmax, nested absmax, offset
    placed = [shape(leaf.shape, leaf.dtype, *e) for leaf, e in zip(leaves, entries, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def loss(adapters, x, up, down):
    def layer(x, weights):
        up, down, a, b = weights
        hidden = in_auto_axes(lambda x, a: x @ a.T, x, a, result=lambda x, _: product_spec(x))
        h = jax.nn.silu(quantized_matmul(x, up, lora=(hidden, b)))
        return x + quantized_matmul(h, down), None

    y, _ = jax.lax.scan(jax.checkpoint(layer), x, (up, down, *adapters))
    return jnp.mean(y.astype(jnp.float32) ** 2)


@functools.cache
def step(card, cut):
    adapters = (
        shape((LAYERS, RANK, IN), jnp.bfloat16, None, None, cut),
        shape((LAYERS, OUT, RANK), jnp.bfloat16, None, cut),
    )
    x = shape((CARDS_USED, TOKENS, IN), jnp.bfloat16, "data")
    return harness.compile_for(
        CARDS[card],
        jax.value_and_grad(loss),
        adapters,
        x,
        stack(OUT, IN, cut),
        stack(IN, OUT, cut),
        count=CARDS_USED,
    )


def exchanges(hlo):
    """(operation, shapes that it leaves) of each exchange between cards, in the entry or a loop."""
    for line in hlo.splitlines():
        found = re.search(r"= (.*) (all-[a-z]+|collective-permute)(?:-start)?\(", line)
        if found:
            # A started gather shows what goes in before what comes out.
            yield found[2], re.findall(r"\w+\[[\d,]*\]", found[1])


@pytest.mark.parametrize(
    ("card", "cut"),
    [
        ("h200", "data"),
        pytest.param("h200", None, marks=pytest.mark.slow),
        ("l40", "data"),
        ("l40", None),
    ],
)
def test_kernels_see_one_cards_rows(card, cut):
    hlo = step(card, cut).as_text()
    kernels = [line for line in hlo.splitlines() if re.search(r"(mpmd_map|pallas_call)\S* =", line)]
    results = {re.search(r"= (\w+\[[\d,]*\])", line)[1] for line in kernels}
    if card == "h200":  # the matmuls themselves
        assert results == {f"bf16[{TOKENS},{OUT}]", f"bf16[{TOKENS},{IN}]"}
    else:  # one decoded weight, of which a card's rows make a product
        assert results == {f"bf16[{IN * OUT}]"}
    sent = [text for _, shapes in exchanges(hlo) for text in shapes]
    rows = CARDS_USED * TOKENS
    sizes = {int(np.prod([int(d) for d in re.findall(r"\d+", t.split("[")[1])])) for t in sent}
    assert not sizes & {rows * IN, rows * OUT}


@pytest.mark.parametrize("card", ["h200", "l40"])
def test_a_cut_weight_comes_packed_and_layer_by_layer(card):
    compiled = step(card, "data")
    gathered = {
        text
        for op, shapes in exchanges(compiled.as_text())
        for text in shapes
        if op == "all-gather"
    }
    assert {f"u8[{OUT},{IN // 2}]", f"u8[{IN},{OUT // 2}]"} <= gathered
    whole = 2 * LAYERS * IN * OUT / 2 * (1 + 1 / 32)
    placed = compiled.memory_analysis().argument_size_in_bytes
    assert whole / CARDS_USED < placed < whole / CARDS_USED + 2**25
    # No stack is brought together, and no dense weight: both would be [LAYERS, ...] or 16 bits.
    dense = {f"bf16[{OUT},{IN}]", f"bf16[{IN},{OUT}]"}
    assert not dense & gathered
    assert not any(text.startswith(f"u8[{LAYERS},") for text in gathered)


@pytest.mark.slow
def test_of_whole_weights_only_gradients_are_sent():
    sent = {(op, text) for op, shapes in exchanges(step("h200", None).as_text()) for text in shapes}
    assert sent == {("all-reduce", f"bf16[{RANK * (IN + OUT)}]"), ("all-reduce", "f32[]")}


@pytest.mark.slow
@pytest.mark.parametrize("card", ["h200", "l40"])
def test_a_mesh_whose_axes_are_explicit_sends_the_same(card, monkeypatch):
    """All but gradients, which then lie as what they are gradients of: none are sent whole."""
    auto = {text for _, shapes in exchanges(step(card, "data").as_text()) for text in shapes}
    made, axis = harness.card_mesh, (jax.sharding.AxisType.Explicit,)

    def explicit(card, count=1):
        there = made(card, count)
        return jax.sharding.Mesh(there.devices, there.axis_names, axis_types=axis)

    monkeypatch.setattr(harness, "card_mesh", explicit)
    hlo = step.__wrapped__(card, "data").as_text()
    sent = {text for _, shapes in exchanges(hlo) for text in shapes}
    assert sent <= auto
    assert {f"u8[{OUT},{IN // 2}]", f"u8[{IN},{OUT // 2}]"} <= sent


def test_where_jax_refused_the_plugin_calls_are_cut():
    """As it does where CUDA's libraries are missing and JAX_PLATFORMS says nothing of the CPU."""
    program = f"""
import jax
jax.devices()
from {__name__} import step
print("left" if "CustomSPMDPartitioning" in step("l40", "data").as_text() else "cut")
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "cut"


@pytest.mark.parametrize("card", ["h200", "l40"])
def test_gradients_inside_shard_map(card):
    """JAX adds up what differs between devices, and so has to know that a kernel's result does."""
    dense = jax.ShapeDtypeStruct((OUT, IN), jnp.bfloat16)
    w = jax.eval_shape(lambda w: quantize(w, QuantConfig()), dense)

    def loss(scale, x, w):
        y = quantized_matmul(x * scale, w)
        assert jax.typeof(y).manual_axis_type.varying == {"data"}
        return jax.lax.pmean(jnp.mean(y.astype(jnp.float32) ** 2), "data")

    def step(scale, x, w):
        one_card = harness.card_mesh(CARDS[card], CARDS_USED).abstract_mesh
        specs = (jax.P(), jax.P("data"), jax.P())
        run = jax.shard_map(jax.grad(loss), mesh=one_card, in_specs=specs, out_specs=jax.P())
        return run(scale, x, w)

    scale = jax.ShapeDtypeStruct((IN,), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((CARDS_USED * TOKENS, IN), jnp.bfloat16)
    compiled = harness.compile_for(CARDS[card], step, scale, x, w, count=CARDS_USED)
    summed = [shapes for op, shapes in exchanges(compiled.as_text()) if op == "all-reduce"]
    # XLA of jax 0.12 drops the axis of one.
    one = "" if jax.__version_info__ >= (0, 12) else "1,"
    assert summed == [[f"bf16[{one}{IN}]"]]
