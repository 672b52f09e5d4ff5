"""llama.cpp's file format, in and out, through the `gguf` package (extra `gguf`)."""

from qlora_jax.checkpoints.gguf.read import GGUFFile, open_gguf
from qlora_jax.checkpoints.gguf.write import FILE_TYPES, save_gguf

__all__ = ["FILE_TYPES", "GGUFFile", "open_gguf", "save_gguf"]
