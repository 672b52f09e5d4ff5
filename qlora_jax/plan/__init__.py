"""Floor 5: will it fit? A training step's bytes on a card that need not be here.

import qlora_jax.plan as planning
work = planning.Workload(planning.find_config("llama-65b"), sequence=512)
planning.plan(work, "l40").device.total          # bytes, from the compiler
"""

from qlora_jax.plan.advice import Advice, Switch, advise
from qlora_jax.plan.compiled import ProgramBytes, program_bytes
from qlora_jax.plan.measure import Measured, measure
from qlora_jax.plan.memory import USABLE, Components, Plan, plan
from qlora_jax.plan.plot import plot
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
    "find_config",
    "largest_that_fits",
    "measure",
    "plan",
    "plot",
    "program_bytes",
    "report",
    "text",
]
