"""`nf4_gemv` in plain XLA: few rows change the kernel, not the formula."""

from pallas_kernels.nf4_matmul.reference import nf4_matmul_xla as nf4_gemv_xla

__all__ = ["nf4_gemv_xla"]
