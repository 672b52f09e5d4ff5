"""LoRA+ (arXiv 2402.12354): B learns faster than A.

A starts random and B at zero. In a wide model one rate for both is too small for B, whose updates
then change the layer less than A's: the paper gives B a rate λ times A's, 16 or so, and lowers
the rate itself.
"""

import math
import numbers

import jax
import optax
from jaxtyping import PyTree

from qlora_jax.optim.per_parameter import names_of, wrapped


def loraplus(
    inner: optax.GradientTransformation, lr_ratio: float
) -> optax.GradientTransformationExtraArgs:
    """`inner`, its updates of every `lora_B` multiplied: `loraplus(optax.adamw(2e-4), 16)`.

    That is a learning rate `lr_ratio` times as high for them, weight decay included, as PEFT's
    `create_loraplus_optimizer` sets it. (PEFT gives that rate to trained vectors, such as biases,
    too; here they keep `inner`'s.) Goes inside of `master_weights`, `eight_bit` and `paged`.

    Args:
        inner: a transformation whose last step scales by the learning rate, such as `optax.adamw`.
        lr_ratio: B's learning rate over A's, above 0.

    Raises:
        TypeError: `inner` is no transformation, or `lr_ratio` no number.
        ValueError: `lr_ratio` is not above 0, or infinite.
    """
    # A truth value is a number to Python, and a slip here.
    if isinstance(lr_ratio, bool) or not isinstance(lr_ratio, numbers.Real):
        raise TypeError(f"lr_ratio={lr_ratio!r} must be a number, such as 16.")
    if not 0 < lr_ratio < math.inf:
        raise ValueError(
            f"lr_ratio={lr_ratio} must be a finite number above 0; 1 treats A and B alike."
        )
    inner = wrapped(inner, "loraplus")
    return optax.with_extra_args_support(
        optax.chain(inner, optax.masked(optax.scale(lr_ratio), _is_b))
    )


def _is_b(params: PyTree) -> PyTree:
    """True for the B of every adapter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "lora_B" in names_of(path), params)
