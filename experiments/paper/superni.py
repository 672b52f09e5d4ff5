"""Table 3, right half: T5 on Super-NaturalInstructions, finetuned wholly, with LoRA, with QLoRA.

    python -m experiments.paper.superni --scale tiny \\
        --data ../shared/data/instruct/flan_v2_niv2.jsonl
    python -m experiments.paper.superni --data natural-instructions \\
        --models google/t5-small-lm-adapt google/t5-base-lm-adapt

MODELS are T5 folders or hub names (v1.0, v1.1, LM-adapted or Flan), a column each. DATA is a copy of
the repository allenai/natural-instructions, or flattened rows (topic, instruction, input, output).
The score is ROUGE-L of greedy answers on tasks never trained on.

Adapters have the paper's rank, 16 up to T5-large and 64 above, and its alpha of 64 (appendix B.2);
it gives no other hyperparameters for this table, so the rest is Tk-Instruct's (arXiv 2204.07705,
appendix: constant learning rate, batches of 16, two worked examples, 1024 source and 128 target
tokens, 100 instances a task, two epochs) with the paper's 2e-4 for adapters; set others with the
flags.

The output folder gets a folder per cell, results.json and table.md. The same command again runs
what is missing.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from experiments.cli import keep_compiled_programs, make_console, refuse
from experiments.embedded import ROOT
from experiments.paper.superni_rows import Instance, as_pairs, by_task, load_split
from experiments.paper.table3 import (
    METHODS,
    PUBLISHED,
    SIZES,
    Cell,
    Recipe,
    add_arguments,
    markdown,
    mean_scores,
    read_recipe,
    run_cells,
    write_report,
)
from qlora_jax.checkpoints import save_model
from qlora_jax.data import PairFormat, Seq2SeqBatches, Tokenizer, load_tokenizer, tokenize_pairs
from qlora_jax.evaluate import rouge_l, seq2seq_lm_loss
from qlora_jax.models import EncoderDecoder, EncoderDecoderConfig, paper_lora
from qlora_jax.nn import LoraConfig
from qlora_jax.pretrained import find_folder
from qlora_jax.train import fit
