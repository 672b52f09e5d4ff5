"""Data types compared: stories260K under each, against bitsandbytes' own losses."""

import json
import re

import pytest

from experiments.paper import datatypes
from experiments.paper.superni import tiny_t5
from tests.shared import shared_path


def command(out, *more: str) -> list[str]:
    model = shared_path("data/models/stories260K")
    text = shared_path("data/text/tinystories.txt")
    return [str(model), "--text", str(text), "--out", str(out), *more]


# It runs a real model for longer than it is compiled.
@pytest.mark.optimized
@pytest.mark.parametrize(
    "types",
    [("FP32", "NF4+DQ"), pytest.param(("NF4", "FP4-E2M1"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_losses_equal_bitsandbytes(tmp_path, capsys, types):
    """Torch, transformers and bitsandbytes on the same 32,768 tokens."""
    flags = ["--max-tokens", "32768", "--batch-size", "16", "--types", *types]
    assert datatypes.main(command(tmp_path / "out", *flags)) == 0
    results = json.loads((tmp_path / "out" / "datatypes.json").read_text())["results"]
    reference = json.loads(
        shared_path("data/reference/stories260K/reference_losses.json").read_text()
    )["loss"]
    names = {"FP32": "fp32", "NF4": "nf4", "FP4-E2M1": "fp4", "NF4+DQ": "nf4-dq"}
    for line in results:
        expected = reference[names[line["type"]]]["tinystories_share_first_32769"]
        assert line["tokens"] == expected["tokens"]
        # Double quantization: bitsandbytes' CPU finds other nested codes (tests/vectors).
        tolerance = 2e-5 if line["type"] == "NF4+DQ" else 5e-7
        assert line["nll"] == pytest.approx(expected["nll"], abs=tolerance)
        assert line["perplexity"] == pytest.approx(expected["ppl"], rel=2e-5)
    printed = capsys.readouterr().out
    if "NF4+DQ" in types:
        assert re.search(r"NF4\+DQ +│ +64 │ +4\.127 │ +1\.5275 │", printed)


def test_a_table_over_block_sizes_that_goes_on(tmp_path, capsys, monkeypatch):
    flags = ["--max-tokens", "256", "--window", "64", "--stride", "32"]
    more = ["--types", "FP16", "INT8", "INT4", "FP4-E3M0", "NF4", "--blocksizes", "64", "256"]
    assert datatypes.main(command(tmp_path, *flags, *more)) == 0
    results = json.loads((tmp_path / "datatypes.json").read_text())["results"]
    assert [(r["type"], r["blocksize"]) for r in results[:3]] == [
        ("FP16", None), ("INT8", 64), ("INT8", 256),
    ]  # fmt: skip
    assert all(r["tokens"] == 256 for r in results)
    loss = {(r["type"], r["blocksize"]): r["nll"] for r in results}
    assert abs(loss["INT8", 64] - loss["FP16", None]) < 0.01
    assert loss["NF4", 64] < loss["FP4-E3M0", 64]
    assert (tmp_path / "datatypes.md").read_text().count("\n") == 2 + 9
    assert (tmp_path / "datatypes.png").read_bytes()[:4] == b"\x89PNG"

    def fail(*arguments, **options):
        raise AssertionError("a case was measured again")

    monkeypatch.setattr(datatypes, "measure", fail)
    assert datatypes.main(command(tmp_path, *flags, *more)) == 0
    capsys.readouterr()
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"text": "a"}\n{"text": null}\n')
    t5 = tiny_t5(tmp_path / "t5")
    assert datatypes.main([str(t5), "--text", str(odd), "--out", str(tmp_path / "o")]) == 2
    assert "is an encoder–decoder, but a decoder is asked" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit):
        datatypes.main(command(tmp_path, "--max-tokens", "-1"))
    assert "-1 is too few" in capsys.readouterr().err
    for wrong, words in (
        (["--text", str(odd)], "row 1 of"),
        (["--types", "NF5"], "there is no data type 'NF5'; there are FP32"),
        (["--blocksizes", "48"], "blocksize is 48"),
        (["--window", "64", "--stride", "65"], "stride=65"),
        (["--types", "NF4", "FP16", "NF4"], "NF4 is asked for 2 times"),
        ([], "results of another tokens_sha256, window, stride"),
    ):
        assert datatypes.main(command(tmp_path, *wrong)) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "datatypes.json").write_text("{")
    assert datatypes.main(command(tmp_path)) == 2
    assert "datatypes.json is not valid JSON" in capsys.readouterr().err
