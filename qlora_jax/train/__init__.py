"""Floor 4: how does a step run? State, step, loop, checkpoints, callbacks."""

from qlora_jax.train.callbacks import Callback, MetricsFile, Probe, TensorBoard, WandB
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.config import OPTIMIZERS, TrainConfig
from qlora_jax.train.loop import fit
from qlora_jax.train.run import FitResult
from qlora_jax.train.step import StepMetrics, TrainState, init_state, make_train_step
from qlora_jax.train.traffic import Crossing, HostTraffic, host_traffic

__all__ = [
    "OPTIMIZERS",
    "Callback",
    "Checkpoints",
    "Crossing",
    "FitResult",
    "HostTraffic",
    "MetricsFile",
    "Probe",
    "StepMetrics",
    "TensorBoard",
    "TrainConfig",
    "TrainState",
    "WandB",
    "fit",
    "host_traffic",
    "init_state",
    "make_train_step",
]
