"""Files of results, each put in place whole: a session kills what is late, at any moment.

(As `qlora_jax.files`, which the benchmark of a kernel does not import.)
"""

from pathlib import Path


def put(path: Path, text: str) -> None:
    """Writes a file, in the place of an earlier one only once it is there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
