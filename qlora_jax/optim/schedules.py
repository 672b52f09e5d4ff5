"""Learning rates over steps, and which weights decay: as Hugging Face users name and expect them.

Every schedule is an optax schedule: a function of the step count, evaluated inside the jitted
update. Step t counts finished updates, so the first update of a warmup runs at rate 0, as in
`transformers.get_scheduler`.
"""

import jax
import optax
from jaxtyping import PyTree

from qlora_jax.optim.per_parameter import names_of

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_schedule(
    kind: str, learning_rate: float, *, steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """The rate of update t: a linear warmup from 0, then constant, linear or cosine to 0.

    QLoRA's paper uses "constant" without warmup.

    Args:
      kind: "constant", "linear" (to 0 at `steps`) or "cosine" (half a cosine, to 0 at `steps`).
      learning_rate: the peak rate.
      steps: updates in the whole run, warmup included.
      warmup_steps: updates over which the rate rises from 0 to its peak.

    Raises:
      ValueError: for an unknown kind, or a warmup not shorter than the run.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule is {kind!r}; expected one of {', '.join(SCHEDULES)}.")
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(
            f"warmup_steps={warmup_steps} must be 0 or more and less than steps={steps}."
        )
    after: optax.Schedule
    if kind == "constant":
        after = optax.constant_schedule(learning_rate)
    elif kind == "linear":
        after = optax.linear_schedule(learning_rate, 0.0, steps - warmup_steps)
    else:
        after = optax.cosine_decay_schedule(learning_rate, steps - warmup_steps)
    if warmup_steps == 0:
        return after
    rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def decay_mask(params: PyTree) -> PyTree:
    """True for the weights that decay: all but biases and normalisation weights.

    This is `transformers.Trainer`'s rule, by names: a path with "bias" (a T5's table of relative
    biases, too) or "norm" in one of its names, or with one that begins with "ln_", does not decay.
    Pass it as `optax.adamw(..., mask=decay_mask)`; LoRA's A and B all decay.
    """

    def decays(path: tuple, _leaf: object) -> bool:
        names = [name.lower() for name in names_of(path)]
        return not any("bias" in name or "norm" in name or name.startswith("ln_") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)
