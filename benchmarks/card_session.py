"""Everything with a GPU claim, measured by one command: for a card that is borrowed for minutes.

    python -m benchmarks.card_session --out benchmarks/results/h200 --budget 580
    python -m benchmarks.card_session --out benchmarks/results/h200 --budget 580 --only training
    python -m benchmarks.card_session --out benchmarks/results/h200 --budget 580 \
        --only floor teams cuts

Pieces run in order of importance, each in a process of its own (an allocator's peak never falls
within one, and torch and JAX would share the card), with a share of the time that is left; one that
fails or is late costs the others nothing. The long ones write after each point, so what was
measured stays. `session.json` says what ran, how long, and how it ended.

The kernels come first, because their correctness check decides whether the rest means anything;
what they find (`rules.json`) goes before the standing rules where whole models follow.

Four pieces run only by name: `floor`, what it takes to read a weight; `cuts`, the Hopper kernels'
candidates, into `cuts.json`, to be looked at and copied to `pallas_kernels` before the table is
measured; `teams`, those for thousands of rows, into a folder of that name: some have blocks that
wait for each other, and end the process if they wait in vain; and `profile`, hardware counters,
which many a borrowed card does not let one read.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._files import put


@dataclasses.dataclass(frozen=True)
class Piece:
    """One benchmark: its module and arguments, and its share of the time that is left then."""

    name: str
    arguments: tuple[str, ...]
    share: float
    takes_budget: bool = True
    environment: tuple[tuple[str, str], ...] = ()
    takes_file: tuple[str, Path] | None = None
    """An option, and a file of an earlier piece to give it, if that piece has written it."""
    by_name: bool = False
    """Left out unless `--only` names it."""


def pieces(out: Path, memory_fraction: float) -> list[Piece]:
    """What a session measures, the most telling first."""
    kernels = ("benchmarks.gpu_kernels", "--out", str(out))
    training = ("benchmarks.gpu_training", "--out", str(out), "--matmuls", "auto", "xla")
    decode = ("benchmarks.gpu_decode", "--out", str(out))
    limit = (("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory_fraction)),)
    memory = ("benchmarks.gpu_memory", "--out")
    profile = ("benchmarks.gpu_profile", "--out", str(out / "profile.json"), "--rows", "4096")
    profile += ("--op", "matmul", "transposed", "--implementations", "mosaic_gpu", "bf16")
    floor = ("benchmarks.gpu_floor", "--out", str(out / "floor.json"))
    # A cut reaches down to the rows that were measured before, so these rise for each kernel.
    few = [f"matmul:{rows}:mosaic_gpu" for rows in (1, 64, 128, 1024, 4, 8, 16)]
    # 4096 rows first all the same: they are the goal.
    many = [f"{op}:{rows}:mosaic_gpu" for rows in (4096, 2048) for op in ("matmul", "transposed")]
    teams = ("benchmarks.gpu_kernels", "--out", str(out / "teams"))
    return [
        Piece("floor", floor, 0.25, takes_budget=False, by_name=True),
        Piece("teams", (*teams, "--autotune", *many), 0.5, by_name=True),
        Piece("cuts", (*kernels, "--autotune", *few), 1.0, by_name=True),
        Piece("profile", profile, 1.0, takes_budget=False, by_name=True),
        Piece("kernels", (*kernels, "--kernel-times"), 0.4),
        Piece("peer", ("benchmarks.gpu_bitsandbytes", "--out", str(out)), 0.15),
        Piece("table", (*kernels, "--merge", str(out / "kernels.json")), 0.2, takes_budget=False),
        Piece("decode", decode, 0.4, takes_file=("--rules", out / "rules.json")),
        Piece("training", training, 0.6, takes_file=("--rules", out / "rules.json")),
        Piece("memory", (*memory, str(out / "memory.json")), 0.6, False, limit),
        Piece("streamed", (*memory, str(out / "streamed.json"), "--stream"), 1.0, False, limit),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pieces; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="benchmarks/results/<card>")
    parser.add_argument("--budget", type=float, default=580, help="seconds for everything")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="these pieces alone")
    parser.add_argument(
        "--memory-fraction",
        type=float,
        default=0.34,
        help="of the card, for the 65B step: the paper's 48 GB are 0.34 of an H200, 0.6 of an H100",
    )
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = pieces(options.out, options.memory_fraction)
    unknown = set(options.only or ()) - {piece.name for piece in wanted}
    if unknown:
        parser.error(
            f"--only names {', '.join(sorted(unknown))}; "
            f"there are {', '.join(piece.name for piece in wanted)}"
        )
    wanted = [
        piece
        for piece in wanted
        if (piece.name in options.only if options.only else not piece.by_name)
    ]
    return run(wanted, options.out / "session.json", options.budget)


def run(wanted: Sequence[Piece], report: Path, budget: float) -> int:
    """Run each piece within its share, writing the report after each; 1 if one failed."""
    began, entries = time.monotonic(), []
    for piece in wanted:
        left = budget - (time.monotonic() - began)
        entries.append({"name": piece.name} | run_piece(piece, left * piece.share))
        print(json.dumps(entries[-1]), flush=True)
        put(report, json.dumps(entries, indent=1) + "\n")
    return int(any(entry["status"] != "ok" for entry in entries))


def run_piece(piece: Piece, seconds: float) -> dict[str, object]:
    """How a piece ended: "ok", "late" or its exit status."""
    command = [sys.executable, "-m", *piece.arguments]
    if piece.takes_file and piece.takes_file[1].exists():
        command += map(str, piece.takes_file)
    if piece.takes_budget:
        # Its own clock stops it before ours does, so that it can finish its files.
        command += ["--budget", f"{seconds * 0.9:.0f}"]
    print("+", *command[1:], flush=True)
    began = time.monotonic()
    try:
        environment = os.environ | dict(piece.environment)
        code = subprocess.run(command, env=environment, timeout=seconds, check=False).returncode
        status = "ok" if code == 0 else f"exit {code}"
    except subprocess.TimeoutExpired:
        status = "late"
    return {"status": status, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
