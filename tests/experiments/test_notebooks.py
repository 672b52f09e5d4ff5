"""The notebooks run from the first cell to the last, and say what their text promises."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
# The kernel's client complains about its own event loop and its transport, not about us.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The test suite's eight simulated devices would share two cores here.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    if path.stem == "inside":
        bits = dict(re.findall(r"^(nf4|fp4|int4): (\d\.\d+) bits$", text, re.MULTILINE))
        assert float(bits["nf4"]) > float(bits["fp4"]) > float(bits["int4"]) > 3
        assert "4.127 bits" in text
        adapted = re.findall(r"^(\w+_proj) +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
        assert len(adapted) == 7
        # Four bits are 9 % off on normal weights (quickstart), and of r = 16 no more is used.
        assert all(0.08 < float(wrong) < 0.1 for _, _, wrong, _ in adapted)
        assert all(1 < float(directions) < 16 for *_, directions in adapted)
    if path.stem == "quickstart":
        assert "4.127" in text
        line = next(line for line in text.splitlines() if line.endswith("loaded"))
        before, after, loaded = (float(word) for word in line.split() if word[0].isdigit())
        assert after < before - 0.5
        assert loaded == after
