"""Floor 5: will it fit? A training step's bytes on a card that need not be here.

    from qlora_jax.plan import Workload, find_config, plan

    plan("llama-65b", "l40").device.total               # bytes, from the compiler: the paper's step
    plan(Workload(find_config("t5-11b"), sequence=512, target=128), "rtx-4090").fits

`qlora_jax.plan` is this package (`ql.plan.plan(...)`); from a shell, `qlora-jax plan`.
"""

from qlora_jax.plan.advice import Advice, Switch, advise
from qlora_jax.plan.compiled import ProgramBytes, program_bytes
from qlora_jax.plan.measure import Measured, measure
from qlora_jax.plan.memory import USABLE, Components, Plan, plan
from qlora_jax.plan.plot import check_plot, plot
from qlora_jax.plan.preflight import check_fits
from qlora_jax.plan.report import Report, report, text
from qlora_jax.plan.search import largest_that_fits
from qlora_jax.plan.shapes import SHAPES, find_config
from qlora_jax.plan.workload import Workload

__all__ = [
    "SHAPES",
    "USABLE",
    "Advice",
    "Components",
    "Measured",
    "Plan",
    "ProgramBytes",
    "Report",
    "Switch",
    "Workload",
    "advise",
    "check_fits",
    "check_plot",
    "find_config",
    "largest_that_fits",
    "measure",
    "plan",
    "plot",
    "program_bytes",
    "report",
    "text",
]
