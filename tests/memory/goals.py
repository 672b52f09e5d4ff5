"""What the memory goals are stated for, and the plan of one of them."""

import jax.numpy as jnp
import pytest

from pallas_kernels.compile_for import PLUGIN_HINT, gpu_compiler_available
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Plan, Workload, find_config, plan
from qlora_jax.train import TrainConfig

GIB = 2**30

needs_compiler = pytest.mark.skipif(
    not gpu_compiler_available(), reason=f"no GPU compiler here. {PLUGIN_HINT}"
)


def planned(
    model: str,
    card: str,
    *,
    accumulation: int = 1,
    gradients_on_host: bool = False,
    update_in_backward: bool = False,
    lora_dtype=jnp.float32,
    **more,
) -> Plan:
    """r=64 on all linears, global-norm clipping unless layers are updated in the backward pass,
    paged AdamW, a micro-batch of one example."""
    train = TrainConfig(
        micro_batch_size=1,
        gradient_accumulation_steps=accumulation,
        gradients_on_host=gradients_on_host,
        update_in_backward=update_in_backward,
        max_grad_norm=None if update_in_backward else 0.3,
        # 16-bit adapters learn through float32 copies of them.
        master_weights=lora_dtype != jnp.float32,
    )
    assert train.paged
    lora = LoraConfig(r=64, lora_dropout=0.05, dtype=lora_dtype)
    work = Workload(find_config(model), train=train, lora=lora, **more)
    return plan(work, card)
