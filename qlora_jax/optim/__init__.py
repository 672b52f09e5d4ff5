"""Floor 2: where does Adam live? `paged` around any per-leaf optax transformation; schedules."""

from qlora_jax.optim.paged import paged, resting_shardings
from qlora_jax.optim.schedules import SCHEDULES, decay_mask, learning_rate_schedule

__all__ = ["SCHEDULES", "decay_mask", "learning_rate_schedule", "paged", "resting_shardings"]
