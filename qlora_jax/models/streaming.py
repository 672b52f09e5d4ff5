"""The loop over a model's stacked layers: what it keeps for the backward pass, and where from."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

class _Plan(NamedTuple):
    apply: Any
    treedef: Any
    moves: tuple
    depth: int
    offload: bool

def stream_layers(apply, x, layers, *, moves, offload=False):
    leaves, treedef = jax.tree.flatten(layers)
    depth = leaves[0].shape[0]
    one = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(l.shape[1:], l.dtype) for l in leaves])
    closed, closure = jax.closure_convert(apply, jax.ShapeDtypeStruct(x.shape,x.dtype), one)
    plan = _Plan(closed, treedef, tuple(map(bool, map(moves, leaves))), depth, offload)
    moving = [l for l, m in zip(leaves, plan.moves) if m]
    staying = [l for l, m in zip(leaves, plan.moves) if not m]
    return _stream(plan, x, moving, staying, closure)

def _merge(plan, here, stay):
    here, stay = iter(here), iter(stay)
    return jax.tree.unflatten(plan.treedef, [next(here) if m else next(stay) for m in plan.moves])

def _fetch(stacks, index):
    return [jax.device_put(jax.lax.dynamic_index_in_dim(s, index, keepdims=False), _DEVICE) for s in stacks]

@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stream(plan, x, moving, staying, closure):
    return _run(plan, x, moving, staying, closure, save=False)[0]

def _run(plan, x, moving, staying, closure, save):
    moving = [jax.device_put(m, _HOST) for m in moving]
    def step(carry, xs):
        x, here = carry
        i, stay = xs
        there = _fetch(moving, jnp.minimum(i + 1, plan.depth - 1))
        y = plan.apply(x, _merge(plan, here, stay), *closure)
        kept = None
        if save:
            kept = jax.device_put(x, _HOST) if plan.offload else x
        return (y, there), kept
    start = x, _fetch(moving, jnp.int32(0))
    (y, last), kept = jax.lax.scan(step, start, (jnp.arange(plan.depth), staying))
    return y, last, kept

def _fwd(plan, x, moving, staying, closure):
    value = lambda t: jax.tree.map(lambda p: p.value, t, is_leaf=lambda p: hasattr(p,'perturbed'))
    trained = [i for i, s in enumerate(staying) if s.perturbed], [i for i, c in enumerate(closure) if c.perturbed]
    moving, staying, closure = value(moving), value(staying), value(closure)
    y, last, kept = _run(plan, x.value, moving, staying, closure, True)
    return y, (moving, staying, closure, last, kept, _S(trained))

@jax.tree_util.register_static
class _S(tuple): pass

def _bwd(plan, residuals, dy):
    moving, staying, closure, last, kept, (trained, outside) = residuals
    moving = [jax.device_put(m, _HOST) for m in moving]
    kept_stack = [jax.device_put(kept, _HOST)] if plan.offload else [kept]
    def fetch(i):
        return _fetch(moving, i), (_fetch(kept_stack, i)[0] if plan.offload else None)
    def step(carry, xs):
        dy, here, held, sums = carry
        i, stay, kept = xs
        there = _fetch(moving, jnp.maximum(i - 1, 0))
        held_next = _fetch(kept_stack, jnp.maximum(i - 1, 0))[0] if plan.offload else None
        x = held if plan.offload else kept
        def layer(x, mine, around):
            stays = list(stay); all_ = list(closure)
            for k, v in zip(trained, mine): stays[k] = v
            for k, v in zip(outside, around): all_[k] = v
            return plan.apply(x, _merge(plan, here, stays), *all_)
        _, pull = jax.vjp(layer, x, [stay[k] for k in trained], [closure[k] for k in outside])
        dx, mine, around = pull(dy)
        sums = [a + b.astype(a.dtype) for a, b in zip(sums, around)]
        return (dx, there, held_next, sums), mine
    held = _fetch(kept_stack, jnp.int32(plan.depth - 1))[0] if plan.offload else None
    start = dy, last, held, [jnp.zeros(closure[k].shape, jnp.float32) for k in outside]
    (dx, _, _, sums), mine = jax.lax.scan(step, start, (jnp.arange(plan.depth), staying, None if plan.offload else kept), reverse=True)
    to_staying = [None] * len(staying); to_closure = [None] * len(closure)
    for k, g in zip(trained, mine): to_staying[k] = g
    for k, g in zip(outside, sums): to_closure[k] = g.astype(closure[k].dtype)
    return dx, [None]*len(moving), to_staying, to_closure
_stream.defvjp(_fwd, _bwd, symbolic_zeros=True)
