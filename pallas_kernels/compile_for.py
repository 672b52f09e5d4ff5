"""Compile for a GPU that is not in this machine, and read what the compiler made of it.

XLA compiles for a *description* of a card (`Card.target_config`), not for a device. So a machine
without any GPU can tell whether a kernel fits a card's shared memory, how many bytes a whole
training step takes (`Compiled.memory_analysis()`), and what instructions will run. What it cannot
tell is whether the numbers are right (interpret mode does) and how fast they come (a card does).

Three things make it work: the arguments are shapes that carry a sharding on the described device;
the *abstract mesh* of that device is in force while the function is traced, because Pallas asks it
for the card's kind; and the two XLA plugin wheels are installed, which hold the GPU compiler and
need neither driver nor CUDA libraries.

    compiled = compile_for(CARDS["h200"], step, state, batch)     # shapes or arrays, any pytree
    for kernel in inspect_kernels(CARDS["h200"], nf4_matmul, x, codes, absmax):
        print(kernel.name, kernel.registers, kernel.spill_bytes, kernel.smem)

In such a compile `jax.default_backend()` is still "cpu": whatever chooses by it chooses wrongly.
Pass the implementation as an argument.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies
from jaxlib.mlir import ir

from pallas_kernels.cards import Card

PLUGIN_HINT = (
    "Compiling for a card needs XLA's GPU plugin: pip install --no-deps "
    f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
)


def gpu_compiler_available() -> bool:
    """Whether the XLA plugin for CUDA is installed (a GPU is not needed)."""
    return _plugin() is not None


def _plugin() -> str | None:
    """The name that JAX finds XLA's plugin for CUDA by."""
    versions = ("cuda13", "cuda12")
    installed = (v for v in versions if importlib.util.find_spec(f"jax_{v}_plugin"))
    return next((f"jax_plugins.xla_{version}" for version in installed), None)


@functools.cache
def card_mesh(card: Card, count: int = 1) -> jax.sharding.Mesh:
    """A mesh ("data") of so many described cards of one machine, to lay arguments out on.

    Raises:
      RuntimeError: without the plugin.
    """
    if not gpu_compiler_available():
        raise RuntimeError(PLUGIN_HINT)
    form = f"1x1x{count}"
    describe = functools.partial(
        topologies.get_topology_desc,
        form,
        platform="cuda",
        target_config=card.target_config(),
        topology=form,
    )
    try:
        topology = describe()
    except NotImplementedError:
        _load_plugin()
        topology = describe()
    return topologies.make_mesh(topology, (count,), ("data",))


def _load_plugin() -> None:
    """Loads XLA's GPU plugin where JAX refused it, for want of libraries that only running needs.

    JAX asks for them unless JAX_PLATFORMS leaves GPUs out.
    """
    plugin = _plugin()
    assert plugin is not None
    with mock.patch.dict(os.environ, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
        importlib.import_module(plugin).initialize()
    # As JAX does with the plugins that it loads itself: how calls are cut over devices.
    for register in xla_bridge._plugin_callbacks:
        register(c_api=xla_bridge._backend_factories["cuda"].c_api)


def on_card(card: Card, tree: Any, *, count: int = 1) -> Any:
    """The tree's arrays (or shapes) as shapes on so many cards.

    A leaf cut over a mesh of as many devices, whose axis is called "data", is cut over the cards;
    of any other, each card has all.
    """
    mesh = card_mesh(card, count)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)
        at, spec = getattr(leaf, "sharding", None), jax.sharding.PartitionSpec()
        if isinstance(at, jax.sharding.NamedSharding) and count > 1 and at.mesh.size == count:
            spec = at.spec
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def tracing_for(card: Card, count: int = 1) -> contextlib.AbstractContextManager[object]:
    """Within it, what is traced is for so many cards: it may ask for kernels that only they run."""
    return jax.sharding.use_abstract_mesh(card_mesh(card, count).abstract_mesh)


def lower_for(card: Card, fn: Callable[..., Any], *args: Any, count: int = 1) -> jax.stages.Lowered:
    """Trace and lower `fn` (jitted already or not) for so many cards; arguments may be shapes."""
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    with tracing_for(card, count):
        traced = jitted.trace(*on_card(card, args, count=count))
        # Named, because JAX looks for the "gpu" among this machine's where types say what is cut.
        return traced.lower(lowering_platforms=("cuda",))


def compile_for(
    card: Card,
    fn: Callable[..., Any],
    *args: Any,
    count: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compile `fn` for the card. Raises RuntimeError where the plugin wheels are missing.

    Args:
      card: the target; nothing of it needs to be in this machine.
      fn: a function, or the result of `jax.jit` (static and donated arguments are honoured).
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; shapes and dtypes are read, and for
        several cards how they are cut (see `on_card`).
      count: how many cards of one machine the program is for.
      compiler_options: XLA options for this compile alone.

    Returns:
      `jax.stages.Compiled`: `.memory_analysis()` in bytes, `.as_text()`, `.cost_analysis()`.
    """
    return compile_lowered(lower_for(card, fn, *args, count=count), compiler_options)


_OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def compile_lowered(
    lowered: jax.stages.Lowered, compiler_options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """`lowered.compile()` for an absent card: fully optimized, and not kept in JAX's cache.

    JAX's persistent cache (`jax_compilation_cache_dir`) takes such a program, but cannot read it
    again: the second compile would warn of a damaged entry. `jax_disable_most_optimizations`, where
    it is set, is for this machine's programs alone.

    Args:
      lowered: from `lower_for`.
      compiler_options: XLA options for this compile alone.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        return lowered.compile(compiler_options=_OPTIMIZED | dict(compiler_options or {}))
    finally:
        jax.config.update(name, before)


def with_memory_kinds(
    lowered: jax.stages.Lowered, arguments: Any = "device", results: Any = "device"
) -> jax.stages.Lowered:
    """Say which memory of the card's machine each argument and result of a program rests in.

    Where the card is present, shardings with a memory kind do this. A described device has no
    memories and its shardings lose the kind, so the program's entry function is marked instead,
    with the attributes that such shardings lower to. That is the signature alone: a program that
    computes with an argument in host memory still has to say so inside (`jax.device_put` to
    `jax.memory.Space.Host` on entry, to `.Device` where it is read).

    Args:
      lowered: from `lower_for`; marked in place.
      arguments: "device" or "pinned_host" for every leaf of the tuple of arguments, or for whole
        subtrees (a tree prefix).
      results: the same for what the program returns.

    Returns:
      `lowered`, for `compile_lowered`: `memory_analysis()` then counts host bytes apart.
    """
    flat_arguments = jax.tree.leaves(jax.tree.broadcast(arguments, lowered.args_info[0]))
    # Arguments that the program never reads are no parameters of it.
    kept = sorted(lowered._lowering.compile_args["kept_var_idx"])
    kinds = {
        "arg_attrs": [flat_arguments[index] for index in kept],
        "res_attrs": jax.tree.leaves(jax.tree.broadcast(results, lowered.out_info)),
    }
    module: Any = lowered.compiler_ir("stablehlo")
    (main,) = [op for op in module.body.operations if str(op.attributes["sym_name"]) == '"main"']
    with module.context:
        for name, wanted in kinds.items():
            marked = []
            for kind, old in zip(wanted, main.attributes[name], strict=True):
                entries: Any = ir.DictAttr(old)
                attributes = {item.name: item.attr for item in entries}
                attributes["mhlo.memory_kind"] = ir.StringAttr.get(kind)
                marked.append(ir.DictAttr.get(attributes))
            main.attributes[name] = ir.ArrayAttr.get(marked)
    return lowered


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """One GPU kernel as the compiler left it. Counts are None where no ptxas was found."""

    name: str
    ptx: str
    smem: int
    """Bytes of shared memory per thread block: what XLA launches it with, and what it declares."""
    grid: tuple[int, ...]
    threads: int
    """Threads per block."""
    registers: int | None
    """Registers per thread."""
    spill_bytes: int | None
    """Bytes of registers stored to and loaded from local memory: 0 in a good kernel."""
    sass: str | None
    """Machine code as text, one instruction a line; None where it was not asked for, or no nvdisasm
    was found."""


def find_tool(name: str) -> str | None:
    """The path of `ptxas` or `nvdisasm`: from the wheels nvidia-cuda-nvcc and -nvdisasm, a CUDA
    toolkit on the PATH, or inside the wheel triton; None where there is none."""
    site = Path(sysconfig.get_paths()["purelib"])
    inside = (site / "nvidia/cu13/bin" / name, site / "triton/backends/nvidia/bin" / name)
    if os.access(inside[0], os.X_OK):
        return str(inside[0])
    return shutil.which(name) or (str(inside[1]) if os.access(inside[1], os.X_OK) else None)


def inspect_kernels(
    card: Card, fn: Callable[..., Any], *args: Any, sass: bool = False
) -> tuple[jax.stages.Compiled, list[KernelCode]]:
    """Compile `fn` for the card and take apart every GPU kernel in it.

    Args:
      card: whose compiler is asked.
      fn: what to compile, and its arguments, as `compile_for` takes them.
      sass: disassemble the kernels as well. nvdisasm takes longer than XLA does for a kernel.

    Returns:
      The compiled program and its kernels, XLA's own fusions included, in PTX order.
    """
    with tempfile.TemporaryDirectory() as folder, _mosaic_dump(folder):
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compiled = compile_for(card, fn, *args, compiler_options=options)
        launches = _launches(Path(folder))
        kernels = []
        for path in sorted(Path(folder).rglob("*.ptx")):
            # XLA leaves a module without kernels, too: its constants.
            if ".entry" in (ptx := path.read_text()):
                kernels += _take_apart(card, ptx, launches, sass)
    return compiled, list({kernel.name: kernel for kernel in kernels}.values())


@contextlib.contextmanager
def _mosaic_dump(folder: str) -> Iterator[None]:
    """Mosaic GPU reads its own variable where XLA reads its options."""
    name = "MOSAIC_GPU_DUMP_TO"
    before = os.environ.get(name)
    os.environ[name] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclasses.dataclass(frozen=True)
class _Launch:
    grid: tuple[int, ...]
    threads: int
    smem: int


_LAUNCH = re.compile(
    r"\] (?P<name>[\w.$-]+) grid: \[(?P<grid>[\d, ]+)\] threads: \[(?P<threads>[\d, ]+)\]"
    r"\s+shared_memory: (?P<smem>\d+)"
)


def _launches(folder: Path) -> dict[str, _Launch]:
    """Kernel name -> how XLA launches it, from the dump of its thunks."""
    found = {}
    for path in folder.glob("*thunk_sequence*.txt"):
        for match in _LAUNCH.finditer(path.read_text()):
            grid = tuple(int(n) for n in match["grid"].split(","))
            threads = int(np.prod([int(n) for n in match["threads"].split(",")]))
            found[match["name"]] = _Launch(grid, threads, int(match["smem"]))
    return found


def _take_apart(
    card: Card, ptx: str, launches: dict[str, _Launch], with_sass: bool
) -> list[KernelCode]:
    parts = re.split(r"(?=^[ \t]*(?:\.visible |\.weak )?\.entry )", ptx, flags=re.MULTILINE)
    header, entries = parts[0], parts[1:]
    usage, sass = _assemble(card, ptx, with_sass)
    kernels = []
    for entry in entries:
        named = re.search(r"\.entry\s+([\w.$]+)", entry)
        assert named is not None
        name = named[1]
        launch = launches.get(name, _Launch((), _declared_threads(entry), 0))
        registers, spill_bytes = usage.get(name, (None, None))
        kernels.append(
            KernelCode(
                name=name,
                ptx=header + entry,
                smem=launch.smem + _declared_smem(header + entry),
                grid=launch.grid,
                threads=launch.threads,
                registers=registers,
                spill_bytes=spill_bytes,
                sass=sass.get(name),
            )
        )
    return kernels


def _declared_threads(entry: str) -> int:
    match = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", entry)
    return int(np.prod([int(n) for n in match[1].split(",")])) if match else 0


def _declared_smem(ptx: str) -> int:
    """Bytes of shared memory that the code declares: XLA's fusions all of theirs, Triton's kernels
    what inline PTX adds (`_triton_decoder`) to that which they are launched with."""
    return sum(int(n) for n in re.findall(r"\.shared[^;\[]*\.b8 [\w.$]+\[(\d+)\]", ptx))


_USAGE = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def _assemble(
    card: Card, ptx: str, with_sass: bool
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """name -> (registers, spilled bytes), name -> SASS; empty where the tools are missing."""
    ptxas, nvdisasm = find_tool("ptxas"), find_tool("nvdisasm") if with_sass else None
    if ptxas is None:
        return {}, {}
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        target = re.search(r"\.target\s+(\w+)", ptx)
        arch = target[1] if target else card.arch
        report = _run(ptxas, "-v", f"-arch={arch}", str(source), "-o", str(cubin)).stderr
        usage = {
            m["name"]: (int(m["registers"]), int(m["stores"]) + int(m["loads"]))
            for m in _USAGE.finditer(report)
        }
        text = _run(nvdisasm, "-c", str(cubin)).stdout if nvdisasm else ""
    sections = re.split(r"^//-+ \.text\.([\w.$]+)\s+-+$", text, flags=re.MULTILINE)[1:]
    return usage, dict(zip(sections[::2], sections[1::2], strict=True))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()}")
    return done
