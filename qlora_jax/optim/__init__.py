"""Floor 2: where does Adam live? `paged` and `eight_bit` around any per-leaf optax transformation,
master weights for 16-bit adapters; LoRA+; a learner updated in the backward pass; schedules.
"""

from qlora_jax.optim.eight_bit import SignedState, UnsignedState, eight_bit
from qlora_jax.optim.learner import Learner, Rule, is_learner, learners
from qlora_jax.optim.loraplus import loraplus
from qlora_jax.optim.master import MasterState, master_weights
from qlora_jax.optim.paged import paged, resting_shardings
from qlora_jax.optim.schedules import SCHEDULES, decay_mask, learning_rate_schedule

__all__ = [
    "SCHEDULES",
    "Learner",
    "MasterState",
    "Rule",
    "SignedState",
    "UnsignedState",
    "decay_mask",
    "eight_bit",
    "is_learner",
    "learners",
    "learning_rate_schedule",
    "loraplus",
    "master_weights",
    "paged",
    "resting_shardings",
]
