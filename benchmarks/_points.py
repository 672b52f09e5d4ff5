"""What is measured: linear layers of Llama models times numbers of rows, most telling first.

Rows are tokens: 1 is decoding one sentence, 4096 a training batch. A session on a borrowed card may
end early, so the order of `plan` is the order of importance.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from pallas_kernels.dispatch import Config

SHAPES: dict[str, tuple[int, int]] = {
    "7b-qkvo": (4096, 4096),
    "7b-gate-up": (11008, 4096),
    "7b-down": (4096, 11008),
    "13b-qkvo": (5120, 5120),
    "13b-gate-up": (13824, 5120),
    "13b-down": (5120, 13824),
    "70b-qo": (8192, 8192),
    "70b-kv": (1024, 8192),
    "70b-gate-up": (28672, 8192),
    "70b-down": (8192, 28672),
}
"""name -> (n, k): out-features, in-features of Llama 7B, 13B and Llama-2 70B."""

TOY_SHAPES: dict[str, tuple[int, int]] = {"toy": (128, 256), "toy-down": (256, 128)}

ROWS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
OPS = ("matmul", "transposed", "dequantize", "lora")
"""`lora` is `matmul` with an adapter, which a kernel adds inside, or a second product after it."""

RANK = 64
"""Of the measured adapters: the paper's."""

FUSING = ("triton", "mosaic_gpu")
"""The implementations whose kernels can add an adapter themselves."""

BASELINES = ("bf16", "bf16-xla")
"""The 16-bit peers, `jnp.dot` on a bf16 weight: through cuBLAS, and as XLA's autotuner prefers."""

DENSE = (*BASELINES, "torch-bf16")
"""Every 16-bit product that is measured: torch's in a process of its own (`gpu_bitsandbytes`)."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing to time: an op in one implementation at one size."""

    op: str
    implementation: str
    rows: int
    shape_name: str
    n: int
    k: int
    blocksize: int = 64
    config: Config | None = None
    """How a kernel is to cut its work; None takes the dispatch table's."""
    rank: int = 0
    """Of the adapter, for the op "lora"."""
    fuse_lora: bool = False

    @property
    def size(self) -> int:
        """Weights."""
        return self.n * self.k

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as it lies in memory: codes, absmax codes and nested absmax."""
        if self.implementation in BASELINES:
            return 2 * self.size
        blocks = self.size // self.blocksize
        return self.size // 2 + blocks + 4 * -(-blocks // 256)

    @property
    def bytes(self) -> int:
        """Bytes one call must move at least: weight and activations in, result out (bf16)."""
        if self.op == "dequantize":
            return self.weight_bytes + 2 * self.size
        adapter = 2 * self.rank * (self.rows + self.n)
        return self.weight_bytes + 2 * self.rows * (self.n + self.k) + adapter

    @property
    def flops(self) -> int:
        """Floating-point operations of one call: a multiply and an add per row and weight."""
        if self.op == "dequantize":
            return self.size
        return 2 * self.rows * (self.size + self.rank * self.n)

    @property
    def variant(self) -> str:
        """The implementation, and whether it adds the adapter itself."""
        return f"{self.implementation}{' fused' * self.fuse_lora}"

    @property
    def label(self) -> str:
        """A short name for tables and messages."""
        rows = "" if self.op == "dequantize" else f" M={self.rows}"
        return f"{self.op}{rows} {self.shape_name} {self.variant}"


def plan(
    implementations: Sequence[str],
    shapes: dict[str, tuple[int, int]],
    rows: Sequence[int] = ROWS,
    ops: Sequence[str] = OPS,
) -> Iterator[list[Point]]:
    """Groups of points in order of importance: one row, training batches, dequantize, adapters, the
    rest."""
    low, high = min(rows), max(rows)
    wanted = [("matmul", low), ("matmul", high), ("transposed", high), ("dequantize", 0)]
    wanted += [("lora", low), ("lora", high)]
    middle = [m for m in sorted(rows) if m not in (low, high)]
    wanted += [(op, m) for op in ("matmul", "transposed", "lora") for m in middle]
    wanted += [("transposed", low)] if low != high else []
    for op, m in dict.fromkeys(wanted):
        if op not in ops:
            continue
        without = (*BASELINES, "mosaic_gpu") if op == "dequantize" else ()
        names = [i for i in implementations if i not in without]
        group = [
            Point(op, implementation, m, name, *shape, rank=RANK * (op == "lora"), fuse_lora=fuse)
            for (name, shape), implementation in itertools.product(shapes.items(), names)
            for fuse in ((False, True) if op == "lora" and implementation in FUSING else (False,))
        ]
        if group:
            yield group
