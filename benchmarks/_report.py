"""From numbers to a table, a roofline plot, and a kernel's own time out of a trace."""

import argparse
import collections
import datetime
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks._files import put
from benchmarks._points import DENSE
from benchmarks._programs import Program


def machine() -> dict[str, Any]:
    """What a measurement must be told with: device, driver, versions, date, flags."""
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _driver(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """End the program where JAX has no GPU: a CPU would take hours over numbers of no use."""
    if jax.default_backend() != "gpu":
        parser.error(
            f"JAX runs on {jax.devices()[0].device_kind} and sees no GPU: install jax[cuda13], "
            "or pass --toy to try the program"
        )


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "none"


def kernel_times(run: Callable[[], Any], program: Program) -> dict[str, Any]:
    """Seconds the GPU was busy per call, and the busiest kernels, from JAX's profiler (CUPTI).

    Where the profiler fails, its error: it must not cost the point the time that is measured.
    """
    try:
        busy = _busy(run)
    except Exception as error:
        return {"kernel_error": f"{type(error).__name__}: {error}"[:300]}
    if not busy:
        return {"kernel_error": "the trace holds no GPU kernels"}
    calls = program.copies * program.rounds
    top = {name: seconds / calls for name, seconds in busy.most_common(4)}
    return {"kernel_s": sum(busy.values()) / calls, "kernels": top}


def _busy(run: Callable[[], Any]) -> collections.Counter[str]:
    """Kernel -> seconds, of one traced run."""
    busy: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for path in sorted(Path(folder).rglob("*.xplane.pb")):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if "/device:GPU" not in plane.name:
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            busy[event.name] += event.duration_ns * 1e-9
    return busy


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Several `kernels.json` of one card as one; of a point in several, the last that was timed.

    Raises ValueError where the runs are of different devices.
    """
    runs = [json.loads(path.read_text()) for path in paths]
    devices = {run["meta"]["device"] for run in runs}
    if len(devices) != 1:
        raise ValueError(f"the runs are of {sorted(devices)}; merge those of one device")
    points: dict[str, dict[str, Any]] = {}
    for point in (point for run in runs for point in run["points"]):
        if "seconds" in point or "seconds" not in points.get(point["label"], {}):
            points[point["label"]] = point
    # Each run measured its ceilings; the best of them is what the card can do.
    names = list(runs[0]["ceilings"])
    ceilings = {name: max(run["ceilings"].get(name, 0) for run in runs) for name in names}
    metas = [run["meta"] for run in runs]
    told = [run for meta in metas for run in meta.get("runs", [meta])]
    meta = {key: value for meta in metas for key, value in meta.items()} | {"runs": told}
    return {"meta": meta, "ceilings": ceilings, "points": list(points.values())}


def add_peer(results: dict[str, Any], folder: Path) -> None:
    """Take in what `benchmarks.gpu_bitsandbytes` left in a folder, if it did."""
    path = folder / "bitsandbytes.json"
    if path.exists():
        peer = json.loads(path.read_text())
        results["meta"] |= peer["meta"]
        labels = {point["label"] for point in peer["points"]}
        own = [point for point in results["points"] if point["label"] not in labels]
        results["points"] = own + peer["points"]


def write_all(results: dict[str, Any], folder: Path) -> None:
    """`kernels.json`, `kernels.md` and `roofline.png` of the results."""
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / "kernels.json", json.dumps(results, indent=1))
    write_markdown(results, folder / "kernels.md")
    write_roofline(results, folder / "roofline.png")


def _measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [point for point in results["points"] if "seconds" in point]


def write_markdown(results: dict[str, Any], path: Path) -> None:
    """One table per op and number of rows: µs per call, and times as fast as the baseline."""
    meta, ceilings = results["meta"], results["ceilings"]
    text = [
        f"# {meta['device']}: kernels",
        "",
        f"jax {meta['jax']}, Python {meta['python']}, driver {meta['driver']}, {meta['date']}. "
        + "Microseconds per call (times as fast as the fastest bf16 product, JAX's or torch's; "
        + "share of the ceiling that binds). Weights cold, median of repeats; written by "
        + "benchmarks/gpu_kernels.py.",
    ]
    if ceilings:
        read = ceilings.get("read_bytes_per_s")
        text += [
            "",
            f"Ceilings of this run: copy {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s"
            + (f", read {read / 1e9:.0f} GB/s" if read else " (which what only reads may exceed)")
            + f", bf16 product {ceilings['bf16_flops'] / 1e12:.0f} TFLOP/s.",
        ]
    measured = _measured(results)
    for op, rows in dict.fromkeys((p["op"], p["rows"]) for p in measured):
        here = [p for p in measured if (p["op"], p["rows"]) == (op, rows)]
        names = _names(here)
        title = op if op == "dequantize" else f"{op}, {rows} row{'s' * (rows != 1)}"
        text += ["", f"## {title}", "", "| shape | n × k | " + " | ".join(names) + " |"]
        text += ["|---|---|" + "---|" * len(names)]
        for shape in dict.fromkeys(p["shape_name"] for p in here):
            line = {_variant(p): p for p in here if p["shape_name"] == shape}
            first = next(iter(line.values()))
            cells = [_cell(line.get(name), line, ceilings) for name in names]
            text.append(f"| {shape} | {first['n']} × {first['k']} | " + " | ".join(cells) + " |")
    failed = [p for p in results["points"] if p["status"] not in ("ok", "not measured")]
    if failed:
        text += ["", "## Wrong or cannot run", ""]
        text += [f"- {p['label']}: {p['status']} {p.get('error', '')}".rstrip() for p in failed]
    skipped = sum(p["status"] == "not measured" for p in results["points"])
    if skipped:
        text += ["", f"{skipped} points were not measured: the time budget was spent."]
    put(path, "\n".join(text) + "\n")


def _cell(
    point: dict[str, Any] | None, line: dict[str, dict[str, Any]], ceilings: dict[str, float]
) -> str:
    if point is None:
        return "–"
    floor = max(point["bytes"] / bandwidth(ceilings), point["flop"] / ceilings["bf16_flops"])
    cell = f"{point['seconds'] * 1e6:.1f}"
    notes = []
    base = [line[name]["seconds"] for name in DENSE if name in line]
    if base and point["implementation"] not in DENSE:
        notes.append(f"{min(base) / point['seconds']:.2f}×")
    notes.append(f"{floor / point['seconds']:.0%}")
    if point["status"] == "wrong":
        notes.append("**wrong**")
    return f"{cell} ({', '.join(notes)})"


def bandwidth(ceilings: dict[str, float]) -> float:
    """Bytes/s of the faster of what reads and what copies; older files have the copy alone."""
    return max(ceilings["copy_bytes_per_s"], ceilings.get("read_bytes_per_s", 0))


def write_roofline(results: dict[str, Any], path: Path) -> bool:
    """FLOP/s over FLOP per byte under the two measured ceilings; False without matplotlib."""
    measured = [p for p in _measured(results) if p["op"] in ("matmul", "transposed")]
    if not measured:
        return False
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("matplotlib is not installed: no roofline plot")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ceilings = results["ceilings"]
    fastest, peak = bandwidth(ceilings), ceilings["bf16_flops"]
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    intensity = [p["flop"] / p["bytes"] for p in measured]
    ends = [min(intensity) / 2, max(*intensity, peak / fastest) * 2]
    axes.plot(
        [ends[0], peak / fastest, ends[1]],
        [ends[0] * fastest / 1e12, peak / 1e12, peak / 1e12],
        color="black",
        linewidth=1,
        label="measured ceilings",
    )
    for name, color in zip(_names(measured), plt.cm.tab10.colors, strict=False):
        for op, marker in (("matmul", "o"), ("transposed", "v")):
            points = [p for p in measured if (p["implementation"], p["op"]) == (name, op)]
            if points:
                axes.scatter(
                    [p["flop"] / p["bytes"] for p in points],
                    [p["flop_per_s"] / 1e12 for p in points],
                    s=18,
                    marker=marker,
                    color=color,
                    label=f"{name}, {op}",
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte that must move",
        ylabel="TFLOP/s",
        title=f"{results['meta']['device']}: x · Wᵀ and dy · W, Llama linears",
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _names(points: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_variant(p) for p in points))


def _variant(point: dict[str, Any]) -> str:
    """The column of a point: its `variant`, which older files and the peer's do not have."""
    return point.get("variant", point["implementation"])
