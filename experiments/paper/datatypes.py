"""Data types compared: the paper's Table 2 and Figure 3, as perplexity of any model on any text.

    python -m experiments.paper.datatypes MODEL --text FILE
    python -m experiments.paper.datatypes /tmp/smollm2 --text wiki.test.raw --max-tokens 32768
    python -m experiments.paper.datatypes facebook/opt-125m EleutherAI/pythia-410m --text FILE

The linear weights of the model's layers are stored in each data type in turn, everything else in
32 bits, and the same tokens are scored: so a difference between two lines is what the data type
does. FP32 is the checkpoint itself, FP16 all of it rounded to 16 bits. --embedding-bits packs
embedding and head as well, in every line. TEXT is a .txt file (texts in it may be separated by
<|endoftext|>) or a .parquet, .json or .jsonl file with a column `text`, joined by blank lines.

Perplexity is weighted by tokens; windows of --window tokens move on by --stride (all of a window by
default), and every token but the first is scored once (qlora_jax/evaluate/text.py).

OUT gets datatypes.json, datatypes.md and datatypes.png (the plot needs matplotlib: extra `plots`).
Cases that OUT has already are not computed again. Of several models each has these in a folder of
its own, OUT/NAME, and mean.md has the perplexity of each data type as the mean over the models,
beside the paper's. It is the plain mean, as the paper's Table 2: tokens of one tokenizer hold more
text than another's, and the models that do worst count most, so that it ranks data types over the
same models and says nothing else.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.cli import COMPUTE_DTYPES, keep_compiled_programs, run_command
from experiments.estimate import bits_per_weight
from experiments.paper.tables import Table as ResultTable
from experiments.rows import decoder_context, find_model
from qlora_jax.cli.arguments import count
from qlora_jax.data import Tokenizer, load_rows, load_tokenizer
from qlora_jax.data.json_file import read_json_if_any
from qlora_jax.evaluate import perplexity, text_batches
from qlora_jax.files import write_whole
from qlora_jax.pretrained import load_pretrained
from qlora_jax.quant import QuantConfig

_END_OF_TEXT = "<|endoftext|>"

TYPES: dict[str, tuple[str, bool]] = {
    "INT8": ("int8", False),
    "INT4": ("int4", False),
    "FP4-E2M1": ("fp4", False),
    "FP4-E3M0": ("fp4_e3m0", False),
    "NF4": ("nf4", False),
    "NF4+DQ": ("nf4", True),
}
"""The paper's names: quant_type, and whether its constants are quantized too."""
_FLOATS = {"FP32": "float32", "FP16": "float16"}
PAPER = {"INT4": 34.34, "FP4-E2M1": 31.07, "FP4-E3M0": 29.48, "NF4+DQ": 27.41}
"""Table 2: mean perplexity on Pile Common Crawl of OPT, BLOOM, LLaMA and Pythia, 125M to 13B."""


class Case(NamedTuple):
    """One line of the table; `blocksize` is None where nothing is quantized."""

    name: str
    blocksize: int | None

    @property
    def quant(self) -> QuantConfig | None:
        """How the linear weights are stored; None for a float type."""
        if self.blocksize is None:
            return None
        quant_type, double = TYPES[self.name]
        return QuantConfig(quant_type, blocksize=self.blocksize, double_quant=double)

    @property
    def bits(self) -> float:
        """Bits per linear weight, constants included."""
        quant = self.quant
        return (32.0 if self.name == "FP32" else 16.0) if quant is None else bits_per_weight(quant)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.datatypes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="embedded model, folder or hub name")
    add("--text", type=Path, required=True, metavar="FILE", help="what is read")
    add("--types", nargs="+", default=[*_FLOATS, *TYPES], metavar="TYPE",
        help=f"({' '.join([*_FLOATS, *TYPES])})")  # fmt: skip
    add("--blocksizes", nargs="+", type=int, default=[64], metavar="N", help="(64)")
    add("--embedding-bits", type=int, choices=[8, 4], help="of embedding and head (32)")
    add(
        "--window",
        type=count,
        default=512,
        metavar="N",
        help="tokens read at once, within the model's context (512)",
    )
    add("--stride", type=count, metavar="N", help="tokens a window moves on by (the window)")
    add("--max-tokens", type=count, metavar="N", help="score only the first so many")
    add("--batch-size", type=count, default=4, metavar="N", help="windows at once (4)")
    add("--compute-dtype", choices=COMPUTE_DTYPES, default="float32", help="of activations")
    add("--out", type=Path, metavar="FOLDER", help="(runs/datatypes/MODEL; runs/datatypes)")
    return parser


def read_tokens(path: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text file, each text in it begun as the model's family begins one.

    Raises:
        ValueError, OSError: no such file, or no text in it.
    """
    if path.suffix in (".parquet", ".json", ".jsonl"):
        rows = load_rows(path)
        if "text" not in rows.column_names:
            raise ValueError(
                f"{path} has the columns {', '.join(rows.column_names)}, but its text is expected "
                "in a column `text`."
            )
        for number, text in enumerate(rows["text"]):
            if not isinstance(text, str):
                raise ValueError(f"row {number} of {path} has the text {text!r}, which is none.")
        return tokenizer.encode("\n\n".join(rows["text"]))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}).") from error
    if _END_OF_TEXT not in text:
        return tokenizer.encode(text)
    parts = (part.strip() for part in text.split(_END_OF_TEXT))
    return [token for part in parts if part for token in tokenizer.encode(part)]


def cases_of(types: Sequence[str], blocksizes: Sequence[int]) -> list[Case]:
    """The lines of the table; ValueError for a type that there is not."""
    cases = []
    for name in types:
        if name in _FLOATS:
            cases.append(Case(name, None))
        elif name in TYPES:
            cases += [Case(name, blocksize) for blocksize in blocksizes]
        else:
            raise ValueError(
                f"there is no data type {name!r}; there are {', '.join([*_FLOATS, *TYPES])}."
            )
    for case, times in Counter(cases).items():
        _ = case.quant  # an impossible blocksize is refused here
        if times > 1:
            raise ValueError(f"{case.name} is asked for {times} times: name types and sizes once.")
    return cases


def measure(
    folder: Path,
    case: Case,
    batches: Sequence[Any],
    compute_dtype: Any,
    embedding_bits: int | None = None,
) -> dict[str, Any]:
    """Loss and perplexity of a model whose linear weights are stored in one data type."""
    began = time.perf_counter()
    model, _ = load_pretrained(
        folder,
        quant=case.quant,
        lora=None,
        compute_dtype=compute_dtype,
        param_dtype=jnp.dtype(_FLOATS.get(case.name, "float32")),
        embedding_bits=embedding_bits,
        remat="none",
        progress=False,
    )
    found = perplexity(model, batches)
    # A model's arrays are in reference cycles (nnx graphs): without this, two are alive at once.
    del model
    gc.collect()
    return {
        "type": case.name,
        "blocksize": case.blocksize,
        "bits": round(case.bits, 4),
        "nll": found.loss,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "seconds": round(time.perf_counter() - began, 1),
    }


def run(options: argparse.Namespace, console: Console) -> int:
    """Measures every case of every model and writes OUT."""
    cases = cases_of(options.types, options.blocksizes)
    names = [Path(model).name for model in options.models]
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{times} models are called {name}: each needs a folder of its own.")
    folders = [find_model(model) for model in options.models]
    for folder in folders:
        decoder_context(folder)  # what is no decoder is refused before one is measured
    root = options.out or Path("runs") / "datatypes"
    outs = [root / name for name in names]
    if len(outs) == 1 and options.out is not None:
        outs = [options.out]
    results = [
        measure_model(model, folder, out, cases, options, console)
        for model, folder, out in zip(options.models, folders, outs, strict=True)
    ]
    if len(results) > 1:
        mean = mean_table(results, names)
        write_whole(root / "mean.md", mean.markdown())
        console.print(mean.rich())
        console.print(str(root / "mean.md"), highlight=False)
    return 0


def measure_model(
    model: str,
    folder: Path,
    out: Path,
    cases: Sequence[Case],
    options: argparse.Namespace,
    console: Console,
) -> list[dict[str, Any]]:
    """Measures every case of one model and writes its files; returns a line for each case."""
    window = min(options.window, decoder_context(folder))
    tokenizer = load_tokenizer(folder)
    ids = read_tokens(options.text, tokenizer)
    if options.max_tokens is not None:
        ids = ids[: options.max_tokens + 1]
    batches = text_batches(
        ids,
        window=window,
        stride=options.stride,
        batch_size=options.batch_size,
        pad_token_id=tokenizer.pad_token_id,
    )
    about = {
        "model": model,
        "text": options.text.name,
        "tokens_sha256": hashlib.sha256(repr(ids).encode()).hexdigest(),
        "window": window,
        "stride": options.stride or window,
        "compute_dtype": options.compute_dtype,
        "embedding_bits": options.embedding_bits,
    }
    out.mkdir(parents=True, exist_ok=True)
    keep_compiled_programs(out.parent / ".jax-cache")
    known = _known(out / "datatypes.json", about)
    results = []
    for case in cases:
        if case not in known:
            dtype = jnp.dtype(options.compute_dtype)
            known[case] = measure(folder, case, batches, dtype, options.embedding_bits)
        results.append(known[case])
        line = results[-1]
        block = "" if case.blocksize is None else f", blocks of {case.blocksize}"
        console.print(
            f"{case.name}{block}: {line['nll']:.4f} nats, perplexity {line['perplexity']:.3f}",
            highlight=False,
        )
        text = json.dumps({**about, "results": list(known.values())}, indent=1)
        write_whole(out / "datatypes.json", text + "\n")
    console.print(table(results, about))
    write_whole(out / "datatypes.md", markdown(results))
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot without matplotlib: pip install 'qlora-jax[plots]'", markup=False)
    else:
        plot(results, out / "datatypes.png", title=f"{Path(model).name}, {about['text']}")
    console.print(str(out), highlight=False)
    return results


def _known(path: Path, about: dict[str, Any]) -> dict[Case, dict[str, Any]]:
    """The cases that a file has, where they are of the same model, text and windows."""
    saved = read_json_if_any(path)
    if not saved:
        return {}
    different = [key for key, value in about.items() if saved.get(key) != value]
    if different:
        raise ValueError(
            f"{path} holds results of another {', '.join(different)}: choose another --out or "
            "delete it."
        )
    return {Case(line["type"], line["blocksize"]): line for line in saved["results"]}


_HEAD = ("data type", "block", "bits/weight", "nats/token", "above FP16", "perplexity")


def _lines(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    base = next((r["nll"] for r in results if r["type"] in ("FP16", "FP32")), None)
    base = next((r["nll"] for r in results if r["type"] == "FP16"), base)
    return [
        [
            line["type"],
            "" if line["blocksize"] is None else str(line["blocksize"]),
            f"{line['bits']:.3f}",
            f"{line['nll']:.4f}",
            "" if base is None else f"{line['nll'] - base:+.4f}",
            f"{line['perplexity']:.3f}",
        ]
        for line in results
    ]


def table(results: Sequence[dict[str, Any]], about: dict[str, Any]) -> Table:
    """The results for a terminal."""
    shown = Table(
        title=f"{about['model']} on {about['text']}: {results[0]['tokens']:,} tokens, windows of "
        f"{about['window']}, stride {about['stride']}",
        title_justify="left",
    )
    for index, name in enumerate(_HEAD):
        shown.add_column(name, justify="right" if index else "left")
    for line in _lines(results):
        shown.add_row(*line)
    return shown


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    rows = [_HEAD, ("---",) * len(_HEAD), *_lines(results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def mean_table(results: Sequence[Sequence[dict[str, Any]]], names: Sequence[str]) -> ResultTable:
    """Mean perplexity of each case over the models, the paper's beside it.

    Args:
        results: of each model, its lines of the same cases.
        names: the models'.
    """
    rows = []
    for lines in zip(*results, strict=True):
        name, block = lines[0]["type"], lines[0]["blocksize"]
        mean = sum(line["perplexity"] for line in lines) / len(lines)
        # The paper's blocks.
        rows.append((name, block, mean, PAPER.get(name) if block == 64 else None))
    return ResultTable(
        "mean",
        f"Mean perplexity over {', '.join(names)}",
        ("data type", "block", f"mean of {len(names)} models", "paper"),
        tuple(rows),
        digits=2,
    )


def plot(results: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Loss over bits per weight, one line per data type, one point per block size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(line["type"] for line in results):
        points = [(line["bits"], line["nll"]) for line in results if line["type"] == name]
        if name in _FLOATS:
            style = "--" if name == "FP16" else ":"
            axes.axhline(points[0][1], color="0.4", linewidth=1, linestyle=style, label=name)
            continue
        bits, losses = zip(*sorted(points), strict=True)
        axes.plot(bits, losses, marker="o", markersize=4, linewidth=1.3, label=name)
    axes.set_xlabel("bits per linear weight, constants included")
    axes.set_ylabel("nats per token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
