"""The loop over a model's layers: what of a layer waits for the backward pass, and where.

Layers are stacked (every leaf of their state carries a leading axis of layers) and run under one
`jax.lax.scan`. The backward pass needs each layer's intermediate results again; `REMAT` says which
of them are kept, in which memory, and which are computed a second time:

| remat | kept of a layer, on the card | elsewhere | computed again |
|---|---|---|---|
| full | its input | | the layer |
| offload | nothing | its input, in pinned host memory | the layer |
| attention | its input, attention's output and log-sum-exp ("chunked") | | all but attention |
| dots | its input and every product | | what lies between |
| none | everything | | nothing |

All give the same loss and gradients, to rounding. "offload" costs one copy of `batch · sequence ·
hidden_size` numbers out and one in per layer, which overlap with the layers' products; it pays
where inputs of many layers on long sequences are most of the memory (80 layers of 8,192 at 8,192
tokens: 10 GiB).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

from qlora_jax.models.chunked_attention import ATTENTION
from qlora_jax.models.streaming import stream_layers
from qlora_jax.optim import learners
from qlora_jax.quant import PRODUCT

LAYER_INPUT = "layer_input"
"""The name (`jax.ad_checkpoint.checkpoint_name`) of what enters a layer."""

REMAT: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "none": None,
}

STREAMABLE = ("full", "offload")
"""Those that go with weights that stream: a layer is computed again as they come in once more."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(x, a layer's frozen weights, what else is the layer's own) -> (x, output)."""


def check_remat(
    remat: str, *, stream_weights: bool = False, update_in_backward: bool = False
) -> None:
    """Refuses an unknown policy, or one that the loop written out (`streaming.py`) does not have.

    Raises:
        ValueError: saying what there is to choose from.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}, but one of {', '.join(REMAT)} is needed.")
    if stream_weights and remat not in STREAMABLE:
        raise ValueError(
            f"remat is {remat!r}, but where weights stream a layer is computed again as they come "
            "in the second time: give remat='full' or 'offload'."
        )
    if update_in_backward and remat not in STREAMABLE:
        raise ValueError(
            f"remat is {remat!r}, but where a layer is updated in the backward pass it is computed "
            "again there: give remat='full' or 'offload', or leave update_in_backward out."
        )


def run_layers(
    step: Step, x: PyTree, frozen: PyTree, own: PyTree, *, remat: str, stream_weights: bool = False
) -> tuple[Any, Any]:
    """Runs stacked layers, one after another.

    Args:
        step: one layer.
        x: what goes through, an array or several.
        frozen: weights that take no gradient; every leaf carries the layers' axis.
        own: adapters, dropout keys, flags: anything else with that axis. An `optim.Learner` among
            them is updated layer by layer in the backward pass.
        remat: a key of `REMAT`.
        stream_weights: whether the large leaves of `frozen` lie in pinned host memory and come in
            one layer at a time (`streaming.py`).

    Returns:
        What came through, and the outputs stacked.

    Raises:
        ValueError: as `check_remat`.
    """
    learns = bool(learners(own))
    check_remat(remat, stream_weights=stream_weights, update_in_backward=learns)
    if stream_weights or learns:
        return stream_layers(
            step, x, frozen, own, offload=remat == "offload", stay=not stream_weights
        )

    def named(x: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        return step(checkpoint_name(x, LAYER_INPUT), *layer)

    policy = REMAT[remat]
    if policy is not None:
        # Inside a scan, nothing can be merged with the recomputation across iterations, so the
        # barriers that prevent_cse puts in would only hinder fusion.
        named = jax.checkpoint(named, policy=policy, prevent_cse=False)
    return jax.lax.scan(named, x, (frozen, own))
