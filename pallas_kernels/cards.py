"""The cards by name: what a GPU that may not be in this machine can do.

Three readers share this table. `pallas_kernels.compile_for` hands a card's `target_config()` to XLA
and so compiles for a card that is absent; the kernels' dispatch looks up what was tuned for it; and
`qlora_jax.plan` compares a training step's bytes with its memory.

Two limits decide how fast a kernel can run, and both stand here: `bandwidth` (bytes/s of device
memory) and `matmul_flops` (bf16 tensor-core FLOP/s). They are the vendor's rates, hence leads; a
measurement (benchmarks/gpu_kernels.py) takes its ceilings from the card itself.

Sources. Processor counts, clocks, shared memory, L2 and memory sizes of A100, A6000, H100, H200,
B200: the device descriptions published with XLA (xla/backends/gpu/target_config/specs). T4, RTX
3090: CUDA's deviceQuery. RTX 3060 (12 GB): clock and bandwidth from memory of NVIDIA's product
page; its memory as PyTorch reports it (11.75 GiB), its tensor cores by the RTX 3090's rate per
processor and clock. L40, RTX 4090: shared/facts/jax.md. RTX 5090: NVIDIA's Blackwell whitepaper;
its memory as PyTorch reports it (31.36 GiB). Tensor-core rates: NVIDIA's datasheets and
whitepapers, dense, with float32 accumulation.
"""

import dataclasses
from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """What one streaming multiprocessor of a compute capability offers."""

    smem: int
    """Bytes of shared memory."""
    smem_optin: int
    """Bytes of shared memory that one thread block can have at most."""
    threads: int
    fpus: int
    """Float32 multiply-adds per clock."""
    accelerated: bool = False
    """Whether code is built for the 'a' variant (sm_90a, sm_100a), which wgmma and tcgen05 need."""
    registers: int = 65536


# CUDA programming guide, "Technical specifications per compute capability".
_MULTIPROCESSORS = {
    (7, 5): Multiprocessor(65536, 65536, 1024, 64),
    (8, 0): Multiprocessor(167936, 166912, 2048, 64),
    (8, 6): Multiprocessor(102400, 101376, 1536, 128),
    (8, 9): Multiprocessor(102400, 101376, 1536, 128),
    (9, 0): Multiprocessor(233472, 232448, 2048, 128, accelerated=True),
    (10, 0): Multiprocessor(233472, 232448, 2048, 128, accelerated=True),
    (12, 0): Multiprocessor(102400, 101376, 1536, 128),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """One NVIDIA GPU model.

    `description` is what JAX reports as `device_kind` where the card is present. Pallas looks up a
    compute capability under such a name; `pallas_kind` is the name that it can look up: the card's
    own where Pallas knows it, else a sibling's of the same compute capability.
    """

    name: str
    description: str
    pallas_kind: str
    compute_capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    clock_ghz: float
    bandwidth: int
    """Bytes per second of device memory."""
    memory: int
    """Bytes of device memory."""
    l2: int
    """Bytes of level-2 cache: what a benchmark must exceed to measure memory."""
    matmul_flops: float
    """Dense tensor-core FLOP/s in bf16 with float32 accumulation (fp16 on the T4)."""

    @property
    def multiprocessor(self) -> Multiprocessor:
        """Shared memory, threads and units of one of the card's multiprocessors."""
        return _MULTIPROCESSORS[self.compute_capability]

    @property
    def arch(self) -> str:
        """The name ptxas and nvdisasm use, for example 'sm_90a'."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}{'a' if self.multiprocessor.accelerated else ''}"

    @property
    def supports_triton(self) -> bool:
        """Whether Pallas' Triton lowering compiles for this card: sm_80 and up."""
        return self.compute_capability >= (8, 0)

    def target_config(self) -> str:
        """The card as a `stream_executor.GpuTargetConfigProto` in text form, for XLA's compiler."""
        major, minor = self.compute_capability
        feature = "ACCELERATED_FEATURES" if self.multiprocessor.accelerated else "NONE"
        fields = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.multiprocessor.smem,
            "shared_memory_per_block_optin": self.multiprocessor.smem_optin,
            "threads_per_core_limit": self.multiprocessor.threads,
            "core_count": self.cores,
            "fpus_per_core": self.multiprocessor.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory,
            "registers_per_core_limit": self.multiprocessor.registers,
            "registers_per_block_limit": 65536,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
        }
        lines = [f"  {key}: {value}" for key, value in fields.items()]
        capability = f"major: {major} minor: {minor} feature_extension: {feature}"
        return "\n".join(
            [
                "gpu_device_info {",
                *lines,
                f"  cuda_compute_capability {{ {capability} }}",
                "}",
                'platform_name: "CUDA"',
                "dnn_version_info { major: 9 minor: 10 }",
                f'device_description_str: "{self.pallas_kind}"',
                "",
            ]
        )


_TABLE = (
    Card(
        name="a100-40",
        description="NVIDIA A100-SXM4-40GB",
        pallas_kind="NVIDIA A100-SXM4-40GB",
        compute_capability=(8, 0),
        cores=108,
        clock_ghz=1.41,
        bandwidth=1_555_200_000_000,
        memory=42_331_013_120,
        l2=41_943_040,
        matmul_flops=312e12,
    ),
    Card(
        name="a100-80",
        description="NVIDIA A100-SXM4-80GB",
        pallas_kind="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        cores=108,
        clock_ghz=1.41,
        bandwidth=2_039_040_000_000,
        memory=85_100_068_864,
        l2=41_943_040,
        matmul_flops=312e12,
    ),
    Card(
        name="a6000",
        description="NVIDIA RTX A6000",
        pallas_kind="NVIDIA A10",
        compute_capability=(8, 6),
        cores=84,
        clock_ghz=1.8,
        bandwidth=768_096_000_000,
        memory=51_041_271_808,
        l2=6_291_456,
        matmul_flops=154.8e12,
    ),
    Card(
        name="l40",
        description="NVIDIA L40",
        pallas_kind="NVIDIA L40",
        compute_capability=(8, 9),
        cores=142,
        clock_ghz=2.49,
        bandwidth=864_000_000_000,
        memory=51_041_271_808,
        l2=100_663_296,
        matmul_flops=181.05e12,
    ),
    Card(
        name="rtx-3060",
        description="NVIDIA GeForce RTX 3060",
        pallas_kind="NVIDIA A10",
        compute_capability=(8, 6),
        cores=28,
        clock_ghz=1.777,
        bandwidth=360_000_000_000,
        memory=12_616_466_432,
        l2=3_145_728,
        matmul_flops=25.5e12,
    ),
    Card(
        name="rtx-3090",
        description="NVIDIA GeForce RTX 3090",
        pallas_kind="NVIDIA A10",
        compute_capability=(8, 6),
        cores=82,
        clock_ghz=1.695,
        bandwidth=936_096_000_000,
        memory=25_447_170_048,
        l2=6_291_456,
        matmul_flops=71e12,
    ),
    Card(
        name="rtx-4090",
        description="NVIDIA GeForce RTX 4090",
        pallas_kind="NVIDIA GeForce RTX 4090",
        compute_capability=(8, 9),
        cores=128,
        clock_ghz=2.52,
        bandwidth=1_008_000_000_000,
        memory=25_757_220_864,
        l2=75_497_472,
        matmul_flops=165.2e12,
    ),
    Card(
        name="rtx-5090",
        description="NVIDIA GeForce RTX 5090",
        # Known to Pallas since jax 0.11, as the workstation card of the same sm_120.
        pallas_kind="NVIDIA RTX PRO 6000",
        compute_capability=(12, 0),
        cores=170,
        clock_ghz=2.407,
        bandwidth=1_792_000_000_000,
        memory=33_672_543_600,
        l2=100_663_296,
        matmul_flops=209.5e12,
    ),
    Card(
        name="t4",
        description="Tesla T4",
        pallas_kind="Tesla T4",
        compute_capability=(7, 5),
        cores=40,
        clock_ghz=1.59,
        bandwidth=320_064_000_000,
        memory=15_843_721_216,
        l2=4_194_304,
        matmul_flops=65e12,
    ),
    Card(
        name="h100",
        description="NVIDIA H100 80GB HBM3",
        pallas_kind="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        cores=132,
        clock_ghz=1.98,
        bandwidth=3_352_320_000_000,
        memory=84_942_979_072,
        l2=52_428_800,
        matmul_flops=989.4e12,
    ),
    Card(
        name="h200",
        description="NVIDIA H200",
        pallas_kind="NVIDIA H200",
        compute_capability=(9, 0),
        cores=132,
        clock_ghz=1.98,
        bandwidth=4_800_000_000_000,
        memory=151_397_597_184,
        l2=52_428_800,
        matmul_flops=989.4e12,
    ),
    Card(
        name="b200",
        description="NVIDIA B200",
        pallas_kind="NVIDIA B200",
        compute_capability=(10, 0),
        cores=148,
        clock_ghz=1.965,
        bandwidth=7_672_320_000_000,
        memory=191_514_411_008,
        l2=132_644_864,
        matmul_flops=2250e12,
    ),
)

CARDS: dict[str, Card] = {card.name: card for card in _TABLE}
"""name -> Card, for example CARDS["rtx-4090"]."""


def find_card(name: str) -> Card:
    """The card of that name ("h200"), or of that device kind as JAX reports it ("NVIDIA H200").

    Raises ValueError, listing the names, for one that the table does not hold.
    """
    for card in _TABLE:
        if name.strip().lower() in (card.name, card.description.lower()):
            return card
    raise ValueError(f"Unknown card {name!r}; expected one of {', '.join(CARDS)}.")
