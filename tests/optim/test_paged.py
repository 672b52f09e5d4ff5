"""`paged` keeps its state on the host and changes no bit of any update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.optim import decay_mask, paged, resting_shardings
from qlora_jax.optim.paged import _groups, _turns
from qlora_jax.optim.per_parameter import owners

# Bits of two programs are compared, so they are compiled as a user's are.
pytestmark = pytest.mark.optimized


def _params(shapes: list[tuple[int, ...]], seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": {"lora_A": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for i, shape in enumerate(shapes)
    }


def _run(
    tx: optax.GradientTransformation, params, steps: int = 3, donate: bool = False, start=None
):
    state = tx.init(params) if start is None else start
    # Donation ends the caller's arrays.
    params = jax.tree.map(jnp.copy, params)

    def step(params, state, scale):
        grads = jax.tree.map(lambda p: jnp.sin(p * scale), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(
        step,
        donate_argnums=(0, 1) if donate else (),
        out_shardings=resting_shardings((params, state)),
    )
    for i in range(steps):
        params, state = step(params, state, jnp.float32(3.0 + i))
    return params, state


def _assert_same_bits(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


TRANSFORMS = {
    "adamw": lambda: optax.adamw(1e-2, b2=0.999, weight_decay=0.1, mask=decay_mask),
    "static mask": lambda: optax.adamw(
        1e-2, weight_decay=0.1, mask={f"layer{i}": {"lora_A": i % 2 == 0} for i in range(4)}
    ),
    "schedule": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 10)),
    "lion": lambda: optax.lion(1e-3),
    "sgd momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "stateless": lambda: optax.sgd(1e-2),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "bf16 moments": lambda: optax.adamw(1e-2, mu_dtype=jnp.bfloat16),
    "clip by value": lambda: optax.chain(optax.clip(0.1), optax.adamw(1e-2)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_paged_equals_unpaged_bit_for_bit(name):
    make = TRANSFORMS[name]
    params = _params([(5, 7), (300,), (2, 3, 4), (129, 33)])
    clip = optax.clip_by_global_norm(0.3)
    expected = _run(optax.chain(clip, make()), params)
    found = _run(optax.chain(clip, paged(make(), min_size=0)), params, donate=True)
    _assert_same_bits(found, expected)


@settings(max_examples=8)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple), min_size=1, max_size=5
    ),
    min_size=st.sampled_from([0, 30, 500]),
    seed=st.integers(0, 100),
)
def test_paged_equals_unpaged_for_any_shapes_and_threshold(shapes, min_size, seed):
    params = _params(shapes, seed)
    tx = optax.adamw(1e-2, weight_decay=0.01)
    _assert_same_bits(_run(paged(tx, min_size=min_size), params), _run(tx, params))


def test_state_rests_on_the_host_and_counters_and_small_leaves_on_the_device():
    params = {"large": jnp.ones((64, 64)), "small": jnp.ones(9)}
    # As many elements as the threshold are not fewer.
    adam = paged(optax.adamw(1e-3), min_size=64 * 64)
    tx = optax.chain(optax.clip_by_global_norm(0.3), adam)
    state = tx.init(params)
    for _ in range(2):
        adam = state[1][0]
        assert adam.mu["large"].sharding.memory_kind == "pinned_host"
        assert adam.nu["large"].sharding.memory_kind == "pinned_host"
        for leaf in (adam.count, adam.mu["small"], adam.nu["small"]):
            assert leaf.sharding.memory_kind == "device"
        params, state = _run(tx, params)
        assert all(p.sharding.memory_kind == "device" for p in jax.tree.leaves(params))


def test_a_step_whose_arrays_are_bound_compiles_once():
    params = {"large": jnp.ones((64, 64)), "small": jnp.ones(9)}
    tx = paged(optax.adamw(1e-3), min_size=1000)
    start = (params, tx.init(params))

    def compiles(start):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(3):
            start = step(*start)
        return step._cache_size()

    assert compiles(start) == 2  # what the docstring of `paged` warns of
    bound = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, start))
    assert compiles(bound) == 1


def test_paged_state_of_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.LoRA(4, 8, 6, rngs=rngs)
            self.two = nnx.LoRA(6, 8, 5, rngs=rngs)

    _, lora, _ = nnx.split(Model(nnx.Rngs(0)), nnx.LoRAParam, ...)
    tx = optax.adamw(1e-2)
    _assert_same_bits(_run(paged(tx, min_size=0), lora), _run(tx, lora))


def test_state_has_the_structure_of_the_unpaged_one():
    params = _params([(3, 3), (4,)])
    tx = optax.adamw(1e-3)
    _assert_same_bits(paged(tx, min_size=0).init(params), tx.init(params))


def test_sharded_parameters_keep_their_sharding_on_the_host():
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("shard"))
    params = jax.device_put(_params([(16, 8), (32, 3), (8,)]), sharding)
    tx = optax.adamw(1e-2)
    found = _run(paged(tx, min_size=0), params, donate=True)
    for leaf in jax.tree.leaves(found[1][0].mu):
        assert leaf.sharding.memory_kind == "pinned_host"
        assert leaf.sharding.spec == sharding.spec
    _assert_same_bits(found, _run(tx, params))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_counters_are_bound_where_sharded_parameters_lie(kind):
    """As the docstring tells a loop of one's own to bind what goes into the first step."""
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(kind,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("shard"))
    tx = paged(optax.adamw(1e-2), min_size=0)

    def run(params):
        state = tx.init(params)
        params, state = (
            jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
            for tree in (params, state)
        )
        return _run(tx, params, start=state)

    params = _params([(16, 4), (8, 32)])
    one, many = run(params), run(jax.device_put(params, rows))
    _assert_same_bits(one, many)


def test_no_parameters():
    tx = paged(optax.adamw(1e-3))
    state = tx.init({})
    assert tx.update({}, state, {})[0] == {}


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (
            lambda tx: optax.chain(optax.clip_by_global_norm(0.3), tx),
            r"optax.chain\(optax.clip_by_global_norm\(0.3\), paged\(",
        ),
        (
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            "sum the gradients of several batches inside of the step",
        ),
    ],
    ids=["clip_by_global_norm", "MultiSteps"],
)
def test_a_transformation_that_mixes_parameters_is_refused_with_where_paged_goes(wrap, hint):
    params = _params([(3, 3), (4,)])
    adam = optax.adamw(1e-3)
    tx = paged(wrap(adam), min_size=0)
    with pytest.raises(ValueError, match=f"mixes parameters.*{hint}"):
        tx.update(params, tx.init(params), params)
    _assert_same_bits(_run(wrap(paged(adam, min_size=0)), params), _run(wrap(adam), params))


def test_an_update_that_looks_at_other_parameters_values_is_refused():
    params = _params([(3, 3), (4,)])

    def update(updates, params):
        largest = jnp.stack([p.max() for p in jax.tree.leaves(params)]).max()
        return jax.tree.map(lambda u: u * largest, updates)

    tx = paged(optax.stateless(update))
    with pytest.raises(ValueError, match="mixes parameters"):
        tx.update(params, tx.init(params), params)


def test_a_state_that_is_not_one_part_per_parameter_is_refused():
    params = _params([(3, 3), (4,)])
    whole = optax.GradientTransformation(
        lambda p: optax.EmptyState() if len(jax.tree.leaves(p)) < 2 else {"flat": jnp.ones(13)},
        lambda u, s, p=None: (u, s),
    )
    with pytest.raises(ValueError, match="one part per parameter"):
        paged(whole).init(params)


def test_few_questions_tell_whose_a_leaf_is():
    """Not one for each parameter, or the time for many would go with their square."""
    params = {f"p{size}": jax.ShapeDtypeStruct((size,), jnp.float32) for size in range(10, 70)}
    adam, asked = optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda _: True, p)), []
    asking = optax.GradientTransformation(lambda p: asked.append(p) or adam.init(p), adam.update)
    state = jax.eval_shape(adam.init, params)
    found = owners(asking, params, state, needed_by="a test")
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert len(sizes) == 1 + 2 * len(params)
    assert list(found.values()) == [None if size == 1 else size - 10 for size in sizes]
    assert len(asked) <= 1 + 2 * 8


def test_negative_threshold_is_refused():
    with pytest.raises(ValueError, match="min_size"):
        paged(optax.adamw(1e-3), min_size=-1)


def test_small_parameters_are_initialised_together_and_large_ones_alone():
    together = [range(2), range(2, 3), range(3, 4), range(4, 5), range(5, 7)]
    assert _groups([3, 5, 1, 9, 20, 2, 6], room=8) == together
    assert _groups([], room=8) == []


def test_the_state_of_small_parameters_comes_first():
    """Every gradient that is used up leaves room for a larger one's state."""
    params = _params([(64,), (4,), (16,)])
    tx = paged(optax.lion(1e-3), min_size=0)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
    puts = [eqn.outvars[0].aval for eqn in jaxpr.eqns if eqn.primitive.name == "device_put"]
    fetched = [aval.size for aval in puts if aval.memory_space == jax.memory.Space.Device]
    assert fetched == [4, 16, 64]


def test_every_state_but_the_last_is_awaited():
    """One that is not may stay on the card until all others are done."""
    # Each large one comes alone, after the small ones.
    params = _params([(4,), (4,), (4,), (64,), (64,)])
    tx = paged(optax.adamw(1e-3), min_size=0)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
    made_by = {var: eqn.primitive.name for eqn in jaxpr.eqns for var in eqn.outvars}
    moments = [made_by[var] for var in jaxpr.outvars[len(params) :] if var.aval.ndim]
    assert moments.count("device_put") == 2
    assert moments.count("optimization_barrier") == len(moments) - 2


@pytest.mark.parametrize(
    ("sizes", "waits"),
    [
        # Two of middling size are together; a third is fetched when the first is back.
        ([4, 4, 4, 4], [[], [], [0], [1]]),
        # One much larger comes alone, though two of the others are no more than it is.
        ([4, 12, 4, 4], [[], [], [0], [2, 3]]),
        ([], []),
    ],
)
def test_two_states_are_fetched_at_once_where_they_are_no_larger_than_others(sizes, waits):
    turns = _turns(sizes)
    assert [index for index, _ in turns] == sorted(range(len(sizes)), key=lambda i: sizes[i])
    assert [awaited for _, awaited in turns] == waits
