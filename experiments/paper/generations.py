"""Answers of a model to the Vicuna or OA questions, as the paper's systems gave theirs.

    python -m experiments.paper.generations --model MODEL [--adapter FOLDER] \\
        --questions vicuna_questions.jsonl --out runs/paper/answers/NAME.jsonl

Nucleus sampling, p = 0.9 at temperature 0.7. MODEL is an embedded model, a Hugging Face folder or
a hub name; the base is quantized to NF4 unless it is in 4 bits or --quant says otherwise.
`--format` is how a question is put: `guanaco` as to the paper's models (the OA questions bring
their conversation with them), `chat` by the model's own template, `alpaca`, or `text` as it is.

One line per answer, in the form of the released generations, written batch by batch: the same
command again goes on where a killed one stopped. Then: python -m experiments.paper.judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.answering import adapter_digest
from experiments.cli import (
    COMPUTE_DTYPES,
    QUANT_HELP,
    keep_compiled_programs,
    read_quant,
    run_command,
)
from experiments.paper.judged import SHARED, questions_of
from experiments.rows import find_model, model_config
from qlora_jax.checkpoints import check_adapter, load_adapter
from qlora_jax.cli.arguments import count, seed
from qlora_jax.data import FORMATS, InstructionFormat, load_chat_template, load_tokenizer
from qlora_jax.data.json_file import parse_json_lines
from qlora_jax.evaluate import JudgedQuestion
from qlora_jax.evaluate.answers import ASSISTANT_SYSTEM
from qlora_jax.files import write_whole
from qlora_jax.generate import (
    PAPER_SAMPLING,
    GenerationConfig,
    check_prompts,
    generate_text,
    read_eos_token_ids,
)
from qlora_jax.pretrained import load_pretrained
from qlora_jax.quant import QuantConfig

STYLES = ("guanaco", "chat", "alpaca", "text")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.generations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="stdlib-1m")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="of a PEFT adapter")
    parser.add_argument(
        "--questions", type=Path, default=SHARED / "prompts/vicuna_questions.jsonl", metavar="FILE"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="runs/paper/answers/MODEL.jsonl")
    parser.add_argument("--format", choices=STYLES, default="guanaco")
    parser.add_argument("--quant", help=QUANT_HELP)
    parser.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=PAPER_SAMPLING.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=PAPER_SAMPLING.temperature)
    parser.add_argument("--top-p", type=float, default=PAPER_SAMPLING.top_p)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--batch-size", type=count, default=8)
    parser.add_argument("--limit", type=count, help="the first questions only")
    return parser


def prompt_writer(style: str, folder: Path) -> Callable[[JudgedQuestion], str]:
    """How a question is put to the model in `folder`."""
    if style == "chat":
        template = load_chat_template(folder)

        def chat(question: JudgedQuestion) -> str:
            turns = [{"role": "user", "content": question.text}]
            return template.render(turns, add_generation_prompt=True)

        return chat
    if style == "alpaca":
        form = FORMATS["alpaca"]
        assert isinstance(form, InstructionFormat)
        return lambda question: form.source({"instruction": question.text})
    if style == "text":
        return lambda question: question.text
    return lambda question: question.row.get(
        "prompt", f"{ASSISTANT_SYSTEM} ### Human: {question.text} ### Assistant:"
    )


def sampling(options: argparse.Namespace, folder: Path) -> GenerationConfig:
    """How long, how random, and where answers end."""
    config = dataclasses.replace(
        PAPER_SAMPLING,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        # What the paper cut answers at: the model has begun to write the human's next turn.
        stop=("### Human",) if options.format == "guanaco" else (),
    )
    return config.with_eos(read_eos_token_ids(folder))


def model_id(
    options: argparse.Namespace, config: GenerationConfig, quant: QuantConfig | None
) -> str:
    """Whose answers these are, to the last option that they depend on."""
    stored = "none" if quant is None else quant.quant_type
    parts = [options.model, stored, options.compute_dtype, options.format]
    if options.adapter is not None:
        parts.insert(1, f"adapter {adapter_digest(options.adapter)[:12]}")
    parts += [f"T={config.temperature:g}", f"p={config.top_p:g}", f"{config.max_new_tokens} tokens"]
    return ", ".join([*parts, f"seed {options.seed}"])


def answered(out: Path, model: str) -> set[str]:
    """The questions that OUT holds; a last line cut short by a kill is taken off it.

    Raises:
        ValueError: OUT holds another model's answers.
    """
    if not out.exists():
        return set()
    text = out.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = [row for _, row in parse_json_lines(whole, out)]
    others = {str(row.get("model_id")) for row in rows} - {model}
    if others:
        raise ValueError(
            f"{out} holds answers of {others.pop()}, and these would be of {model}: give another "
            "--out."
        )
    if whole != text:
        write_whole(out, whole)
    return {str(row.get("question_id", row.get("message_id"))) for row in rows}


def run(options: argparse.Namespace, console: Console) -> int:
    """Answers the questions and writes OUT, batch by batch."""
    questions = questions_of(options.questions)[: options.limit]
    folder = find_model(options.model)
    out = options.out or Path("runs/paper/answers") / f"{Path(options.model).name}.jsonl"
    config = sampling(options, folder)
    quant = read_quant(options.quant, folder)
    lora = None if options.adapter is None else check_adapter(options.adapter)
    model_name = model_id(options, config, quant)
    done = answered(out, model_name)
    todo = [question for question in questions if question.id not in done]
    if not todo:
        console.print(f"{out} holds all {len(questions)} answers.", highlight=False)
        return 0
    write = prompt_writer(options.format, folder)
    reading: dict[str, Any] = {"special": False, "bos": None}
    if options.format == "chat":
        reading = {"special": True, "bos": False}
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode(write(question), **reading) for question in todo]
    check_prompts(ids, config, model_config(folder))
    keep_compiled_programs(out.parent / ".jax-cache")
    dtype = jnp.dtype(options.compute_dtype)
    model, tokenizer = load_pretrained(folder, quant=quant, lora=lora, compute_dtype=dtype)
    if options.adapter is not None:
        load_adapter(options.adapter, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as stream:
        for begin in range(0, len(todo), options.batch_size):
            batch = todo[begin : begin + options.batch_size]
            prompts = [write(question) for question in batch]
            answers = generate_text(
                model,
                tokenizer,
                prompts,
                config,
                key=jax.random.key(options.seed),
                batch_size=options.batch_size,
                **reading,
            )
            for question, prompt, answer in zip(batch, prompts, answers, strict=True):
                text = answer.text.strip()
                row = {
                    **question.row,
                    "model_id": model_name,
                    "prompt": prompt,
                    "generation": text,
                    "generation_truncated": text,
                }
                stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            console.print(f"{len(done) + begin + len(batch)} of {len(questions)}", highlight=False)
    console.print(f"written to {out}", highlight=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 finished, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
