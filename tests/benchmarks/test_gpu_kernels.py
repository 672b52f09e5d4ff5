"""benchmarks/gpu_kernels.py runs in full without a card: toy sizes, kernels interpreted."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _autotune, _points, _programs, _report, gpu_kernels
from benchmarks._points import Point
from pallas_kernels import GemvConfig, _table
from pallas_kernels._triton_config import TritonConfig
from pallas_kernels.cards import CARDS


def run(tmp_path, *arguments: str) -> dict:
    gpu_kernels.main(
        ["--toy", "--out", str(tmp_path), "--repeats", "2", "--threads", "1", *arguments]
    )
    return json.loads((tmp_path / "kernels.json").read_text())


def test_runs_in_full_at_toy_sizes(tmp_path):
    results = run(tmp_path, "--shapes", "toy", "--implementations", "bf16", "xla", "triton")
    status = {point["label"]: point["status"] for point in results["points"]}
    assert set(status.values()) == {"ok"}, status
    assert {(p["op"], p["rows"]) for p in results["points"]} == {
        ("matmul", 1),
        ("matmul", 32),
        ("transposed", 32),
        ("transposed", 1),
        ("dequantize", 0),
        ("lora", 1),
        ("lora", 32),
    }
    assert {"lora M=1 toy triton", "lora M=1 toy triton fused"} < set(status)
    for point in results["points"]:
        assert point["seconds"] > 0
        assert point["bytes_per_s"] == point["bytes"] / point["seconds"]
        assert point["flop_per_s"] == point["flop"] / point["seconds"]
    checked = [p for p in results["points"] if p["implementation"] != "bf16"]
    assert all(p["error_vs_float64"] < 1e-2 and p["error_vs_xla"] < 1e-2 for p in checked)
    assert results["ceilings"]["copy_bytes_per_s"] > 0
    assert results["meta"]["device"] == "cpu"
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    table = (tmp_path / "kernels.md").read_text()
    assert "## matmul, 1 row" in table
    assert "## dequantize" in table


def test_a_spent_budget_leaves_valid_results(tmp_path):
    results = run(tmp_path, "--budget", "0")
    assert results["points"] == []
    assert (tmp_path / "kernels.md").exists()


def test_tuning_leaves_the_results_of_a_run_alone(tmp_path, monkeypatch):
    """A card's tables and its tuning go to one folder."""
    monkeypatch.setattr(_autotune, "configs_to_try", lambda *_: [])
    kept = {name: tmp_path / name for name in ("kernels.json", "kernels.md", "rules.json")}
    for name, path in kept.items():
        path.write_text(name)
    base = ["--toy", "--out", str(tmp_path), "--threads", "1", "--autotune", "matmul:1"]
    assert gpu_kernels.main(base) == 0
    assert all(path.read_text() == name for name, path in kept.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--toy", "--shapes", "8b"), "--shapes names 8b; there are toy, toy-down"),
        (("--toy", "--autotune", "matmul"), "'matmul' is no job; expected OP:ROWS or"),
        (("--toy", "--autotune", "lora:1"), "'lora:1' is no job"),
        ((), "JAX runs on cpu and sees no GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        gpu_kernels.main(["--out", str(tmp_path / "none"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_profiler_that_fails_does_not_cost_the_time(tmp_path, monkeypatch):
    def broken(folder):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(jax.profiler, "trace", broken)
    arguments = ("--implementations", "bf16", "--ops", "matmul", "--shapes", "toy", "--rows", "1")
    (point,) = run(tmp_path, *arguments, "--kernel-times")["points"]
    assert point["status"] == "ok"
    assert point["seconds"] > 0
    assert "PRIVILEGES" in point["kernel_error"]


def test_rules_are_written_while_the_run_goes_on(tmp_path, monkeypatch):
    """After each group, so that a run which is killed leaves those of what it measured."""
    seen = []
    measure = gpu_kernels.Run._measure_group

    def one_more(self, group, pool):
        path = tmp_path / "rules.json"
        seen.append(len(json.loads(path.read_text())) if path.exists() else None)
        measure(self, group, pool)

    monkeypatch.setattr(gpu_kernels.Run, "_measure_group", one_more)
    arguments = ("--implementations", "xla", "--shapes", "toy", "--rows", "1")
    run(tmp_path, *arguments, "--ops", "matmul", "dequantize")
    assert seen == [None, 1]


def test_what_still_compiles_is_not_waited_for():
    release = threading.Event()
    with _programs.compile_threads(1) as pool:
        running, queued = pool.submit(release.wait), pool.submit(print)
    assert queued.cancelled()
    assert not running.done()
    release.set()


def test_an_implementation_that_cannot_run_is_reported_not_fatal(tmp_path):
    arguments = ("--implementations", "nonsense", "--ops", "dequantize", "--shapes", "toy")
    (point,) = run(tmp_path, *arguments)["points"]
    assert point["status"] == "cannot run"
    assert "nonsense" in point["error"]
    assert "cannot run" in (tmp_path / "kernels.md").read_text()


def test_a_wrong_kernel_is_called_wrong(tmp_path, monkeypatch):
    honest = _programs.op_function

    def doubled(point):
        op = honest(point)
        return (lambda *args: 2 * op(*args)) if point.implementation == "xla" else op

    monkeypatch.setattr(_programs, "op_function", doubled)
    errors, poisoned = iter([0.0, 1.0]), []
    monkeypatch.setattr(
        gpu_kernels,
        "compile_check",
        lambda program: functools.partial(lambda error, *_: jnp.float32(error), next(errors)),
    )
    monkeypatch.setattr(gpu_kernels, "poison", poisoned.append)
    arguments = ["--implementations", "xla", "--ops", "matmul", "--shapes", "toy", "--rows", "2"]
    base = ["--toy", "--out", str(tmp_path), "--repeats", "1", "--threads", "1"]
    for _ in range(2):  # first to float64 alone, then beside XLA's result alone
        assert gpu_kernels.main(base + arguments) == 1
        (point,) = json.loads((tmp_path / "kernels.json").read_text())["points"]
        assert point["status"] == "wrong"
        assert "**wrong**" in (tmp_path / "kernels.md").read_text()
        monkeypatch.setattr(_programs, "op_function", honest)
    assert len(poisoned) == 2


def test_ceilings_are_bytes_and_flop_over_time(monkeypatch):
    """A second passes between two looks at the clock: ten calls."""
    clock = types.SimpleNamespace(perf_counter=functools.partial(next, itertools.count()))
    monkeypatch.setattr(gpu_kernels, "time", clock)
    found = gpu_kernels.ceilings(toy=True)
    assert found["copy_bytes_per_s"] == pytest.approx(10 * 2 * 4 * 2**16)  # read and written
    assert found["bf16_flops"] == pytest.approx(10 * 2 * 256**3)


def test_the_cache_of_a_card_is_the_tables():
    assert gpu_kernels.cache_bytes("NVIDIA H200", toy=False) == CARDS["h200"].l2
    assert gpu_kernels.cache_bytes("NVIDIA H300", toy=False) == 2**26
    assert gpu_kernels.cache_bytes("NVIDIA H200", toy=True) == 2**12


@pytest.mark.parametrize("implementation", ["xla", "bf16"])
def test_every_call_of_a_program_stays_in_it(implementation):
    """Nothing merged, hoisted or dropped: as many products as copies times rounds."""
    point = Point("matmul", implementation, 2, "toy", 64, 128)
    program = _programs.Program(point, copies=3, rounds=2, launches=1)
    weights, x = _programs.make_weights(program, 0), _programs.make_input(point, 1)
    lowered = jax.jit(_programs.build(program)).lower(x, weights)
    # Before and after each; on a GPU, XLA would make one kernel of products that share x.
    assert lowered.as_text().count("optimization_barrier") == 2 * 6
    text = lowered.compile().as_text()
    assert text.count(" dot(") + text.count("dot_fusion") + text.count("__onednn") >= 6


def test_a_result_that_is_wrong_only_behind_another_call_shows():
    point = Point("matmul", "xla", 2, "toy", 64, 128)
    program = _programs.Program(point, copies=3, rounds=2, launches=1)
    weights, x = _programs.make_weights(program, 0), _programs.make_input(point, 1)
    last_x, (first, last), _ = jax.jit(_programs.build(program))(x, weights)
    check = jax.jit(_programs.whole_error(point))
    assert _programs.worst_error(check, last_x, weights, (first, last)) < 1e-2
    for wrong in (0 * last, last.at[1, 7].set(jnp.nan)):
        assert not _programs.worst_error(check, last_x, weights, (first, wrong)) < 1e-2
        assert not _programs.worst_error(check, last_x, weights, (wrong, last)) < 1e-2


@pytest.mark.parametrize("implementation", ["xla", "triton", "bf16"])
def test_copies_of_the_smallest_weight_fill_an_h200s_cache_about_twice(implementation):
    point = Point("matmul", implementation, 1, "70b-kv", 1024, 8192)
    program = _programs.size_program(point, 50 << 20, 4.1e12, 7e14)
    assert program.times_cache(50 << 20) >= 1.9


def test_host_weight_is_the_definition():
    point = Point("dequantize", "xla", 0, "toy", 64, 512)
    weight = _programs.packed_weight(jax.random.key(3), point.n, point.k, 64)
    dense = np.asarray(_programs.op_function(point)(None, *weight), np.float64)
    rows, columns = np.array([0, 5, 63]), np.array([0, 1, 63, 64, 511])
    exact = _programs.host_weight(point, weight, rows, columns)
    np.testing.assert_allclose(dense[np.ix_(rows, columns)], exact, rtol=2**-8)


def test_the_plan_puts_one_row_then_training_first():
    groups = list(_points.plan(["bf16", "triton"], _points.SHAPES))
    assert [(g[0].op, g[0].rows) for g in groups[:4]] == [
        ("matmul", 1),
        ("matmul", 4096),
        ("transposed", 4096),
        ("dequantize", 0),
    ]
    assert {p.rows for g in groups for p in g if p.op == "matmul"} == set(_points.ROWS)


def test_packed_bytes_are_four_and_an_eighth_bits():
    point = Point("matmul", "triton", 1, "7b-qkvo", 4096, 4096)
    assert 8 * point.weight_bytes / point.size == pytest.approx(4.127, abs=1e-3)


def test_roofline_without_points_is_no_plot(tmp_path):
    assert not _report.write_roofline({"points": []}, tmp_path / "none.png")


def test_autotuning_writes_rules_that_the_dispatch_can_read(tmp_path, monkeypatch):
    candidates = [TritonConfig(1, 8, 256, num_warps=w, num_stages=1) for w in (2, 4)]
    monkeypatch.setattr(_autotune, "configs_to_try", lambda *_: candidates)
    base = ["--toy", "--out", str(tmp_path), "--threads", "1", "--shapes", "toy"]
    assert gpu_kernels.main([*base, "--autotune", "matmul:1"]) == 0
    (rule,) = json.loads((tmp_path / "tuned.json").read_text())
    assert rule["op"] == "nf4_gemv"
    assert (rule["min_rows"], rule["max_rows"]) == (1, 1)
    assert TritonConfig(**rule["config"]) in candidates
    times = json.loads((tmp_path / "autotune.json").read_text())
    assert len(times) == 2
    assert all(entry["error"] < 1e-2 and entry["seconds"] > 0 for entry in times)


def test_autotuning_a_hopper_kernel_writes_cuts_that_the_dispatch_can_read(tmp_path, monkeypatch):
    """The Hopper kernel cannot run here: XLA stands in for it, and the clock says who wins."""
    candidates = [GemvConfig(), GemvConfig(selects=2)]
    monkeypatch.setattr(_autotune, "configs_to_try", lambda *_: candidates)
    honest = _programs.op_function
    stand_in = {"implementation": "xla", "config": None}
    monkeypatch.setattr(
        _programs, "op_function", lambda point: honest(dataclasses.replace(point, **stand_in))
    )

    def clock(executable, program, *_):
        return {"seconds": 1.0 if program.point.config.selects else 1.1}

    monkeypatch.setattr(_autotune, "timing", clock)
    base = ["--toy", "--out", str(tmp_path), "--threads", "1", "--shapes", "toy"]
    jobs = ["matmul:1:mosaic_gpu", "matmul:4:mosaic_gpu"]
    assert gpu_kernels.main([*base, "--autotune", *jobs]) == 0
    assert len(json.loads((tmp_path / "autotune.json").read_text())) == 4
    monkeypatch.setattr(_table, "CUTS", tmp_path / "cuts.json")
    one, four = _table.cuts.__wrapped__()
    assert one.op == "nf4_gemv"
    assert one.shape == _points.TOY_SHAPES["toy"]
    assert one.config == four.config == GemvConfig(selects=2)
    assert [(cut.min_rows, cut.max_rows) for cut in (one, four)] == [(1, 1), (2, 4)]


def test_a_cut_must_beat_the_kernels_own_choice():
    class Run:
        device = jax.devices()[0]

        def shapes(self):
            return {"even": (128, 256), "failed": (256, 128)}

    def entry(shape, selects, **found):
        config = {"selects": selects}
        return {"shape": shape, "config": config, "own": not selects} | found

    def cuts(*turns):
        again = {"seconds": list(turns), "own": [1.0, 1.0, 1.1]}
        entries = [entry("even", 0, seconds=1.0), entry("even", 2, seconds=0.5, again=again)]
        # Where the kernel's own choice was not measured, there is nothing to beat.
        entries += [entry("failed", 0, failure="spilled"), entry("failed", 2, seconds=0.5)]
        return _autotune.best_cuts(Run(), "matmul", 1, entries, [])

    assert [cut["shape"] for cut in cuts(0.9, 0.9, 0.99)] == [[128, 256]]
    assert cuts(0.9, 0.9, 1.0) == []  # slower in a turn than the other in one
    assert cuts(0.99, 0.99, 0.99) == []  # by too little


@pytest.mark.parametrize("own", [0, 2])
def test_the_winner_is_timed_again_in_turns_with_the_kernels_own_choice(monkeypatch, own):
    calls = []

    def clock(executable, program, *_):
        calls.append(program.point.config.selects)
        return {"seconds": float(len(calls))}

    monkeypatch.setattr(_autotune, "timing", clock)
    pairs, compiled = [], {}
    for selects, seconds in ((own, 3.0), (1, 4.0), (2 - own, 5.0 if own else 2.0)):
        point = Point("matmul", "mosaic_gpu", 1, "a", 128, 256, config=GemvConfig(selects=selects))
        pairs.append(
            ({"own": selects == own, "seconds": seconds}, _programs.Program(point, 2, 1, 1))
        )
        compiled[point] = concurrent.futures.Future()
        compiled[point].set_result((None, 0.0))
    _autotune.time_again(pairs, compiled, (None, None))
    if own:  # it is the fastest itself
        assert not calls
        assert not any("again" in entry for entry, _ in pairs)
    else:
        assert calls == [2, 0] * 5
        assert pairs[2][0]["again"] == {"seconds": [1, 3, 5, 7, 9], "own": [2, 4, 6, 8, 10]}


def test_a_candidate_that_was_not_compiled_in_time_is_left_out():
    class Run:
        def left(self):
            return 100.0

    point = Point("matmul", "mosaic_gpu", 1, "a", 128, 256)
    late, check = concurrent.futures.Future(), concurrent.futures.Future()
    assert late.cancel()
    check.set_result(None)
    job, program = _autotune.Job.read("matmul:1:mosaic_gpu"), _programs.Program(point, 2, 1, 1)
    assert _autotune.measure_shape(Run(), job, [program], {point: late}, check) == []


def test_a_cut_of_many_rows_does_not_reach_down_to_the_gemv_s():
    """Few rows are another kernel: what was measured there says nothing of 17 rows."""

    class Run:
        device = jax.devices()[0]

        def shapes(self):
            return {"a": (128, 256)}

    def entry(op, rows, seconds, own=False):
        found = {"op": op, "rows": rows, "shape": "a", "seconds": seconds, "own": own}
        found["again"] = {"seconds": [seconds], "own": [2.0]}
        return found | {"implementation": "mosaic_gpu", "config": {}}

    here = [entry("matmul", 4096, 2.0, own=True), entry("matmul", 4096, 1.0)]
    for before, first in (([4], 4096), ([4, 64], 65)):
        times = [entry("matmul", rows, 1.0) for rows in before] + [entry("transposed", 512, 1.0)]
        times.append(entry("matmul", 2048, 1.0) | {"implementation": "triton"})
        (cut,) = _autotune.best_cuts(Run(), "matmul", 4096, here, times)
        assert (cut["min_rows"], cut["max_rows"]) == (first, 4096)


def test_weights_that_cannot_be_made_cost_only_their_shape(tmp_path, monkeypatch):
    """As where a card is out of memory: the other shape's times are kept."""
    candidates = [TritonConfig(1, 8, 256, num_warps=w, num_stages=1) for w in (2, 4)]
    monkeypatch.setattr(_autotune, "configs_to_try", lambda *_: candidates)
    honest = _autotune.make_weights

    def made(program, seed):
        if program.point.shape_name == "toy":
            raise MemoryError("no room")
        return honest(program, seed)

    monkeypatch.setattr(_autotune, "make_weights", made)
    base = ["--toy", "--out", str(tmp_path), "--threads", "1", "--autotune", "matmul:1"]
    assert gpu_kernels.main(base) == 0
    times = json.loads((tmp_path / "autotune.json").read_text())
    assert [entry.get("failure") for entry in times] == ["no room", "no room", None, None]
    assert all(entry["seconds"] > 0 for entry in times[2:])


def test_the_rule_of_least_regret_wins_and_failures_do_not():
    def entry(warps, shape, seconds):
        return {"config": {"num_warps": warps}, "shape": shape, "seconds": seconds}

    entries = [entry(2, "a", 1.0), entry(2, "b", 9.0), entry(4, "a", 1.2), entry(4, "b", 3.0)]
    entries += [{"config": {"num_warps": 8}, "shape": "a", "failure": "spilled"}]
    entries.append(entry(8, "b", 0.1))

    class Run:
        device = jax.devices()[0]

        def shapes(self):
            return {"a": (128, 256), "b": (256, 128)}

    rule = _autotune.best_rule(Run(), "transposed", 64, entries)
    assert rule["config"] == {"num_warps": 4}
    assert rule["op"] == "nf4_matmul_transposed"
    # A card that was taken away after one shape says nothing of all.
    assert _autotune.best_rule(Run(), "transposed", 64, entries[::2]) is None


@pytest.mark.parametrize(
    ("op", "rows", "covered"),
    [
        ("matmul", 1, (1, 1)),
        ("matmul", 16, (9, 16)),
        ("matmul", 64, (17, 64)),
        ("transposed", 100, (65, 100)),
        ("matmul", 4096, (1025, _autotune.ALL_ROWS)),
        ("dequantize", 0, (0, _autotune.ALL_ROWS)),
    ],
)
def test_a_rule_speaks_of_the_rows_that_were_measured(op, rows, covered):
    """A session that ends early leaves the rest to the standing table."""
    assert tuple(_autotune.rows_covered(op, rows).values()) == covered


def test_regret_is_a_geometric_mean():
    """Four times as long once costs less than about twice as long twice."""
    times = {"x": {"a": 1.0, "b": 4.0}, "y": {"a": 2.2, "b": 1.9}, "z": {"a": 9.0, "b": 1.0}}
    assert _autotune.least_regret(times, {"a", "b"}) == "x"
    assert _autotune.least_regret({"x": {"a": 1.0}}, {"a", "b"}) is None


def test_a_spent_budget_tunes_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(_autotune, "measure_candidates", refuse)
    options = types.SimpleNamespace(threads=1, out=tmp_path)
    _autotune.tune(types.SimpleNamespace(left=lambda: 9, options=options), ["matmul:1"])
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_not_timed_and_what_the_budget_ends_is_not_run(monkeypatch):
    """The first two of three candidates are measured, and the first one is wrong."""
    monkeypatch.setattr(_autotune, "make_input", lambda *_: None)
    monkeypatch.setattr(_autotune, "poison", lambda *_: None)
    monkeypatch.setattr(_autotune, "make_weights", lambda *_: [None])
    monkeypatch.setattr(_autotune, "timing", lambda *_: {"seconds": 1.0})

    def done(result):
        future = concurrent.futures.Future()
        future.set_result(result)
        return future

    points = [
        Point("matmul", "triton", 1, "toy", 64, 64, config=TritonConfig(1, 8, 256, num_warps=w))
        for w in (1, 2, 4)
    ]
    programs = [types.SimpleNamespace(point=point) for point in points]
    compiled = {p: done((lambda *_, w=p.config.num_warps: (None, (0, w), None), 0)) for p in points}
    left = iter([9, 9, 2])
    run = types.SimpleNamespace(left=lambda: next(left), seed=0)
    check = done(lambda last_x, weight, out: 1.0 if out == 1 else 0.0)
    job = _autotune.Job.read("matmul:1")
    wrong, right = _autotune.measure_shape(run, job, programs, compiled, check)
    assert (wrong["error"], right["error"]) == (1.0, 0.0)
    assert "seconds" not in wrong
    assert (right["seconds"], right["own"]) == (1.0, False)


def test_rules_take_the_fastest_right_implementation_everywhere_measured(monkeypatch):
    def point(op, rows, implementation, seconds, status="ok", shape="a", fuse_lora=False):
        return {
            "fuse_lora": fuse_lora,
            "op": op,
            "rows": rows,
            "implementation": implementation,
            "seconds": seconds,
            "status": status,
            "shape_name": shape,
            "n": 128,
            "k": 256,
        }

    class Run:
        device = jax.devices()[0]
        results: dict = {  # noqa: RUF012
            "points": [
                point("matmul", 1, "xla", 9.0),
                point("matmul", 1, "triton", 2.0),
                point("matmul", 1, "mosaic_gpu", 1.0, status="wrong"),
                point("matmul", 16, "xla", 3.0),
                point("matmul", 16, "mosaic_gpu", 4.0),
                point("matmul", 4096, "triton", 3.0),
                point("matmul", 4096, "mosaic_gpu", 2.0),
                point("matmul", 4096, "bf16", 0.1),
                point("lora", 1, "triton", 3.0),
                point("lora", 1, "triton", 4.0, fuse_lora=True),
                point("lora", 16, "xla", 3.0),
                point("lora", 16, "xla", 1.0, status="wrong", fuse_lora=True),
                point("lora", 4096, "mosaic_gpu", 3.0),
                point("lora", 4096, "mosaic_gpu", 2.5, fuse_lora=True),
                point("transposed", 64, "mosaic_gpu", 1.0),
            ]
        }

        def shapes(self):
            return {"a": (128, 256)}

    few, sixteen, many, back = _autotune.implementation_rules(Run())
    assert (few["op"], few["implementation"], few["max_rows"]) == ("nf4_gemv", "triton", 1)
    assert (sixteen["implementation"], sixteen["max_rows"]) == ("xla", 16)
    assert TritonConfig(**few["config"])
    assert (many["op"], many["implementation"]) == ("nf4_matmul", "mosaic_gpu")
    assert many["config"] is None
    assert many["max_rows"] == _autotune.ALL_ROWS
    # With sixteen rows the adapter inside was wrong; dx has none.
    assert [rule["fuse_lora"] for rule in (few, sixteen, many, back)] == [False, False, True, False]
    inside = [p for p in Run.results["points"] if p["op"] != "lora" or p["fuse_lora"]]
    monkeypatch.setattr(Run, "results", {"points": inside})
    assert not any(rule["fuse_lora"] for rule in _autotune.implementation_rules(Run()))


def test_runs_of_one_card_are_merged_and_of_two_refused(tmp_path):
    def results(name, device, seconds, copy):
        point = {"op": "matmul", "rows": 1, "shape_name": "a", "n": 8, "k": 8, "bytes": 9}
        point |= {"flop": 9, "label": "x", "implementation": "xla", "status": "ok"}
        point |= {"flop_per_s": 1.0} | ({"seconds": seconds} if seconds else {"error": "late"})
        meta = {"device": device, "jax": "0", "python": "3", "driver": "d", "date": "today"}
        ceilings = {"copy_bytes_per_s": copy, "bf16_flops": 1e12}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"meta": meta, "ceilings": ceilings, "points": [point]}))
        return str(path)

    first, last = results("a", "H", 2.0, 1e12), results("b", "H", None, 2e12)
    out = tmp_path / "out"
    assert gpu_kernels.main(["--out", str(out), "--merge", first, last]) == 0
    merged = json.loads((out / "kernels.json").read_text())
    assert [p["seconds"] for p in merged["points"]] == [2.0]
    assert merged["ceilings"]["copy_bytes_per_s"] == 2e12
    assert len(merged["meta"]["runs"]) == 2
    with pytest.raises(ValueError, match="of one device"):
        gpu_kernels.main(["--out", str(out), "--merge", first, results("c", "G", 1.0, 1e12)])
