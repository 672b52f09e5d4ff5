"""Data types compared: stories260K under each, against bitsandbytes' own losses."""

import json
import re

import jax.numpy as jnp
import pytest

from experiments.embedded import ROOT
from experiments.paper import datatypes
from experiments.paper.superni import tiny_t5
from qlora_jax.data import load_tokenizer
from qlora_jax.evaluate import Evaluation
from qlora_jax.quant import QuantConfig
from tests.shared import shared_path


def command(out, *more: str) -> list[str]:
    model = shared_path("data/models/stories260K")
    text = shared_path("data/text/tinystories.txt")
    return [str(model), "--text", str(text), "--out", str(out), *more]


# Each day tests/vectors/test_stories260k.py holds the model to the same losses.
@pytest.mark.slow
@pytest.mark.parametrize("types", [("FP32", "NF4+DQ"), ("NF4", "FP4-E2M1")], ids=" ".join)
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
    more = ["--types", "FP16", "INT8", "NF4", "--blocksizes", "64", "256"]
    assert datatypes.main(command(tmp_path, *flags, *more)) == 0
    results = json.loads((tmp_path / "datatypes.json").read_text())["results"]
    assert [(r["type"], r["blocksize"]) for r in results[:3]] == [
        ("FP16", None), ("INT8", 64), ("INT8", 256),
    ]  # fmt: skip
    assert all(r["tokens"] == 256 for r in results)
    loss = {(r["type"], r["blocksize"]): r["nll"] for r in results}
    for size in (64, 256):
        assert abs(loss["INT8", size] - loss["FP16", None]) < 0.01
        assert 0.1 < loss["NF4", size] - loss["FP16", None] < 0.2
    assert (tmp_path / "datatypes.md").read_text().count("\n") == 2 + 5
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
        ([*flags, "--compute-dtype", "bfloat16"], "results of another compute_dtype: choose"),
        ([*flags, "--embedding-bits", "8"], "results of another embedding_bits: choose"),
        ([], "results of another tokens_sha256, window, stride"),
    ):
        assert datatypes.main(command(tmp_path, *wrong)) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "datatypes.json").write_text("{")
    assert datatypes.main(command(tmp_path)) == 2
    assert "datatypes.json is not valid JSON" in capsys.readouterr().err


def test_each_case_is_stored_by_its_type(tmp_path, monkeypatch):
    told = []

    def load(folder, **options):
        told.append(options)
        return object(), None

    monkeypatch.setattr(datatypes, "load_pretrained", load)
    monkeypatch.setattr(datatypes, "perplexity", lambda *_: Evaluation(1.0, 2.7, 9))
    monkeypatch.setattr(datatypes.gc, "collect", lambda: None)
    for case in datatypes.cases_of(["FP32", "FP16", *datatypes.TYPES], [32]):
        datatypes.measure(tmp_path, case, [], jnp.float32, 8)
    alike = {"lora": None, "compute_dtype": jnp.float32, "embedding_bits": 8, "remat": "none"}
    alike["progress"] = False
    stored = [(None, jnp.float32), (None, jnp.float16)]
    for name in ("int8", "int4", "fp4", "fp4_e3m0", "nf4"):
        stored.append((QuantConfig(name, blocksize=32, double_quant=False), jnp.float32))
    stored.append((QuantConfig("nf4", blocksize=32, double_quant=True), jnp.float32))
    assert told == [{"quant": quant, "param_dtype": dtype, **alike} for quant, dtype in stored]


def test_losses_stand_beside_that_of_16_bits_or_of_32(tmp_path):
    def above(*losses):
        lines = [
            {"type": name, "blocksize": None, "bits": 16.0, "nll": nll, "perplexity": 2.0}
            for name, nll in losses
        ]
        return [line.split(" | ")[4] for line in datatypes.markdown(lines).splitlines()[2:]]

    assert above(("FP32", 1.0), ("FP16", 1.1), ("NF4", 1.3)) == ["-0.1000", "+0.0000", "+0.2000"]
    assert above(("FP32", 1.0), ("NF4", 1.3)) == ["+0.0000", "+0.3000"]
    assert above(("NF4", 1.3)) == [""]


def test_texts_of_a_file_begin_as_texts_do_and_rows_are_one(tmp_path):
    tokenizer = load_tokenizer(ROOT / "tokenizer")
    file, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    file.write_text("One.\n<|endoftext|>\nTwo.<|endoftext|>")
    rows.write_text('{"text": "One."}\n{"text": "Two."}\n')
    assert datatypes.read_tokens(file, tokenizer) == [
        *tokenizer.encode("One."), *tokenizer.encode("Two.")
    ]  # fmt: skip
    assert datatypes.read_tokens(rows, tokenizer) == tokenizer.encode("One.\n\nTwo.")


def test_several_models_and_their_mean(tmp_path, capsys, monkeypatch):
    """Each as alone, in a folder of its own; the plain mean of perplexities beside the paper's."""

    def measure(folder, case, batches, compute_dtype, embedding_bits):
        size = 1 if folder.name == "stdlib-1m" else 4
        found = {"type": case.name, "blocksize": case.blocksize, "bits": case.bits}
        return found | {"nll": 1.0, "perplexity": size * case.bits, "tokens": 128}

    monkeypatch.setattr(datatypes, "measure", measure)
    text = tmp_path / "text.txt"
    text.write_text("return self.width * self.height\n" * 20)
    flags = ["--text", str(text), "--types", "FP16", "INT4", "NF4+DQ", "--blocksizes", "64", "128"]
    models = ["stdlib-1m", "stdlib-4m"]
    assert datatypes.main([*models, *flags, "--out", str(tmp_path / "all")]) == 0
    assert "Mean perplexity over stdlib-1m, stdlib-4m" in capsys.readouterr().out
    assert (tmp_path / "all" / "mean.md").read_text().splitlines()[2:] == [
        "| FP16 | – | 40.00 | – |",
        "| INT4 | 64 | 11.25 | 34.34 |",
        "| INT4 | 128 | 10.62 | – |",
        "| NF4+DQ | 64 | 10.32 | 27.41 |",
        "| NF4+DQ | 128 | 10.16 | – |",
    ]
    files = {"datatypes.json", "datatypes.md", "datatypes.png"}
    for model in models:
        alone, one = tmp_path / f"{model}-alone", tmp_path / "all" / model
        assert datatypes.main([model, *flags, "--out", str(alone)]) == 0
        for folder in (alone, one):
            assert {path.name for path in folder.iterdir()} == files
        for name in ("datatypes.json", "datatypes.md"):
            assert (one / name).read_text() == (alone / name).read_text()
    monkeypatch.chdir(tmp_path)
    assert datatypes.main([models[0], *flags]) == 0
    assert datatypes.main([*models, *flags]) == 0
    runs = tmp_path / "runs" / "datatypes"
    assert {path.name for path in runs.iterdir()} == {*models, "mean.md"}


def test_several_models_are_checked_before_one_is_measured(tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("a model was measured before the next was checked")

    monkeypatch.setattr(datatypes, "measure", fail)
    text = tmp_path / "text.txt"
    text.write_text("a text\n" * 20)
    t5 = tiny_t5(tmp_path / "t5")
    for other, words in (
        ("stdlib-2m", "stdlib-2m is neither a folder here nor an embedded model"),
        (str(t5), "is an encoder–decoder, but a decoder is asked"),
        ("stdlib-1m", "2 models are called stdlib-1m: each needs a folder of its own"),
    ):
        flags = ["--text", str(text), "--out", str(tmp_path / "out")]
        assert datatypes.main(["stdlib-1m", other, *flags]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
