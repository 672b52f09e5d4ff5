"""Files of results, each put in place whole: a session kills what is late, at any moment.

(`experiments.report` and `qlora_jax.checkpoints` do the same; a kernel's benchmark imports
neither.)
"""

from pathlib import Path


def put(path: Path, text: str) -> None:
    """Writes a file, in the place of an earlier one only once it is there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
