"""The program from its arguments to its files, in this process."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import load_model, merge, open_checkpoint, save_adapter, save_model
from qlora_jax.checkpoints.checkpoint import dense
from qlora_jax.cli import SUBCOMMANDS, main
from qlora_jax.models import FAMILIES, EncoderClassifier, module_names
from qlora_jax.nn import LoraConfig, add_lora
from qlora_jax.quant import QuantConfig, QuantizedTensor
from tests.checkpoints.tiny import CONFIG, change_config, write_model
from tests.models.test_encoder import CONFIG as ROBERTA
from tests.shared import shared_path

LORA = LoraConfig(r=2, alpha=4, target_modules=("q_proj",))
# As many rows as the tokenizer of stories260K has tokens.
WIDER = dataclasses.replace(CONFIG, vocab_size=512)

MERGE = ("merge", "base", "adapter", "--mode", "dequantized")
SAFETENSORS, GGUF, PEFT = (
    ("export", "base", "--format", name) for name in ("safetensors", "gguf", "peft")
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A base and an adapter for it."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "base")
    model = load_model(folder / "base", lora=LORA)
    nnx.update(model, jax.tree.map(lambda x: x + 0.02, nnx.state(model, nnx.LoRAParam)))
    save_adapter(folder / "adapter", model, LORA, "base")
    return folder


@pytest.fixture
def models(original, tmp_path):
    shutil.copytree(original, tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_of_every_subcommand(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "usage: qlora-jax" in capsys.readouterr().out


def test_help_names_the_subcommands_without_importing_them(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in SUBCOMMANDS)


def test_quantize(models, tmp_path, capsys):
    out = tmp_path / "packed"
    assert main(["quantize", str(models / "base"), str(out), "--max-shard-size", "20KB"]) == 0
    assert "nf4" in capsys.readouterr().out
    assert (out / "model.safetensors.index.json").is_file()
    model = load_model(out, lora=None)
    assert isinstance(model.layers.mlp.up_proj.kernel.get_value(), QuantizedTensor)
    ours = load_model(models / "base", lora=None)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(ours))


def test_inspect_tells_apart_what_is_stored_otherwise(tmp_path, capsys):
    layers = {f"layers.{i}.w": np.zeros((2, 3), kind) for i, kind in enumerate("fe")}
    save_file(layers | {"ids": np.zeros(4, np.int64)}, tmp_path / "model.safetensors")
    (tmp_path / "x.gguf").touch()  # of a folder with both, safetensors are read
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["name"], row["tensors"], row["stored"], row["nbytes"]) for row in rows} == {
        ("layers.*.w", 1, "f32", 24),
        ("layers.*.w", 1, "f16", 12),
        ("ids", 1, "i64", 32),
    }


def test_inspect_counts_what_is_stored(models, tmp_path, capsys):
    main(["quantize", str(models / "base"), str(tmp_path / "packed")])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "packed"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    row = next(row for row in rows if "up_proj.weight" in row["name"])
    assert row["name"] == "model.layers.*.mlp.up_proj.weight"
    assert (row["tensors"], row["shape"]) == (2, [48, 32])
    assert row["stored"] == "nf4+dq, block 64"
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert sum(row["tensors"] for row in rows) == len(checkpoint.tensors)
    stored = load_file(tmp_path / "packed" / "model.safetensors").items()
    named = sum(x.nbytes for n, x in stored if ".mlp.up_proj.weight" in n)
    # With its scales, its tables and the text about them.
    assert row["nbytes"] == named
    assert row["bits_per_weight"] == 8 * named / (2 * 48 * 32)
    assert main(["inspect", str(models / "adapter")]) == 0
    assert "lora_A.weight" in capsys.readouterr().out
    assert main(["inspect", str(models / "base"), "--layers"]) == 0
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out


@pytest.mark.slow
def test_merge_reports_the_drift(tmp_path, capsys):
    base = shared_path("data/models/stories260K")
    adapter = shared_path("data/reference/stories260K/adapter_trained")
    moved = {}
    for mode in ("original", "dequantized", "requantized"):
        out = str(tmp_path / mode)
        arguments = ["merge", str(base), str(adapter), out, "--mode", mode, "--tokens", "128"]
        assert main([*arguments, "--json"]) == 0
        moved[mode] = json.loads(capsys.readouterr().out)
        assert moved[mode]["tokens"] == 127
        # The reference is the same for all: what was trained.
        assert moved[mode]["perplexity_before"] == moved["original"]["perplexity_before"]
    assert moved["dequantized"]["kl"] < 1e-8 < moved["requantized"]["kl"]
    assert moved["dequantized"]["max_abs"] < 1e-3 < moved["original"]["max_abs"]


def test_merge_reports_on_a_base_that_names_no_context(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(shared_path("data/models/stories260K"), base)
    base.chmod(0o755)
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": None}
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config))
    adapter = shared_path("data/reference/stories260K/adapter_trained")
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out"), "--mode", "original"]
    assert main([*arguments, "--tokens", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 15


@pytest.mark.slow
def test_merge_reports_on_an_adapter_whose_start_took_from_the_base(tmp_path, capsys):
    base, adapter = shared_path("data/models/stories260K"), tmp_path / "adapter"
    lora = LoraConfig(r=4, target_modules=("up_proj",), init_lora_weights="pissa")
    save_adapter(adapter, load_model(base, lora=lora), lora, "base")
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out"), "--mode", "dequantized"]
    assert main([*arguments, "--tokens", "128", "--json"]) == 0
    moved = json.loads(capsys.readouterr().out)
    assert moved["kl"] < 1e-8
    assert moved["max_abs"] < 1e-3


def test_export(models, tmp_path, capsys):
    base, adapter = str(models / "base"), str(models / "adapter")
    assert main(["export", base, str(tmp_path / "b"), "--format", "safetensors"]) == 0
    # Codes stand for float32 numbers, whatever they were before.
    packed, wide = str(tmp_path / "p"), str(tmp_path / "w")
    assert main(["quantize", base, packed, "--dtype", "bfloat16"]) == 0
    flags = ["--format", "safetensors", "--dtype", "float32", "--max-shard-size", "9KB"]
    assert main(["export", packed, wide, *flags]) == 0
    assert (tmp_path / "w" / "model.safetensors.index.json").is_file()
    stored, name = open_checkpoint(packed), "model.layers.1.mlp.up_proj.weight"
    assert {info.dtype for info in stored.tensors.values()} == {"BF16"}
    np.testing.assert_array_equal(open_checkpoint(wide).read(name), dense(stored.read(name)))
    # And the sum with an adapter is rounded once, to what is asked for.
    merged = ["--adapter", adapter, "--mode", "dequantized", "--dtype", "float32"]
    assert main(["export", packed, str(tmp_path / "s"), *flags[:2], *merged]) == 0
    lora = load_file(models / "adapter" / "adapter_model.safetensors")
    module = "model.layers.1.self_attn.q_proj"
    a, b = (np.float64(lora[f"base_model.model.{module}.lora_{x}.weight"]) for x in "AB")
    expected = dense(stored.read(f"{module}.weight")) + LORA.scaling * b @ a
    found = open_checkpoint(tmp_path / "s").read(f"{module}.weight")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    stories = str(shared_path("data/models/stories260K"))
    out = tmp_path / "model.gguf"
    assert main(["export", stories, str(out), "--format", "gguf", "--type", "F16"]) == 0
    assert open_checkpoint(out).tensors["model.embed_tokens.weight"].dtype == "F16"
    # Its vectors are float32, as in every such file.
    assert open_checkpoint(out).config["torch_dtype"] == "float16"
    merged = ["--adapter", adapter, "--mode", "dequantized", "--dtype", "bfloat16"]
    assert main(["export", base, str(tmp_path / "m"), "--format", "safetensors", *merged]) == 0
    assert open_checkpoint(tmp_path / "m").tensors["lm_head.weight"].dtype == "BF16"
    merged = [*merged[:4], "--quant-type", "fp4"]
    assert main(["export", base, str(tmp_path / "f"), "--format", "safetensors", *merged]) == 0
    trained_on = merge(open_checkpoint(base), adapter, "dequantized", quant=QuantConfig("fp4"))
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "f").read(name), trained_on.read(name))
    (models / "adapter" / "tokenizer.json").write_text("with tokens that were added")
    assert main(["export", adapter, str(tmp_path / "a"), "--format", "peft"]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert names == files


def test_the_adapter_of_an_unfinished_run_is_exported(models, tmp_path, capsys):
    run, files = tmp_path / "run", ("adapter_config.json", "adapter_model.safetensors")
    for step in (9, 10, 11):
        shutil.copytree(models / "adapter", run / "adapters" / str(step))
        weights = load_file(run / "adapters" / str(step) / files[1])
        save_file({n: x + np.float32(step) for n, x in weights.items()}, run / files[1])
        (run / files[1]).replace(run / "adapters" / str(step) / files[1])
    # Killed while it was written: the configuration comes last.
    (run / "adapters" / "11" / files[0]).unlink()
    for flags, step in (((), "10"), (("--step", "9"), "9")):
        out = tmp_path / step
        assert main(["export", str(run), str(out), "--format", "peft", *flags]) == 0
        for name in files:
            assert (out / name).read_bytes() == (run / "adapters" / step / name).read_bytes()
    assert main(["export", str(run), str(tmp_path / "x"), "--format", "peft", "--step", "8"]) == 2
    assert "--step is 8, but" in (told := capsys.readouterr().err)
    assert "keeps adapters of 9, 10: give one of these" in told


def test_push_shows_its_card(models, capsys):
    assert main(["push", str(models / "adapter"), "me/x", "--dry-run", "--license", "mit"]) == 0
    assert "license: mit" in capsys.readouterr().out


def test_push_hands_over_what_it_is_told(models, capsys, monkeypatch):
    told = {}
    monkeypatch.setattr("qlora_jax.cli.push.push", lambda *_, **more: told.update(more) or "at")
    options = ["--private", "--revision", "v1", "--message", "first", "--license", "mit"]
    assert main(["push", str(models / "adapter"), "me/x", *options]) == 0
    assert capsys.readouterr().out == "at\n"
    assert told.pop("facts")["license"] == "mit"
    assert told == {"private": True, "revision": "v1", "message": "first"}


def pickle_only(models):
    (models / "base" / "model.safetensors").rename(models / "base" / "pytorch_model.bin")


def outside(models):
    # Beside one file with all of the weights an index is not read.
    (models / "base" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../model.safetensors"}}
    (models / "base" / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(models):
    path = models / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def half(models):
    """Only one layer's adapter, of two that the configuration names."""
    path = models / "adapter" / "adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if "layers.0" in n}
    save_file(tensors, path)


def on_the_head(models):
    """One more adapter, which can be merged but not be used beside the base."""
    path = models / "adapter" / "adapter_model.safetensors"
    name, rows = "base_model.model.lm_head.lora_{}.weight", WIDER.vocab_size
    a, b = np.zeros((2, WIDER.hidden_size), np.float32), np.zeros((rows, 2), np.float32)
    save_file(load_file(path) | {name.format("A"): a, name.format("B"): b}, path)
    file = models / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    targets = [*config["target_modules"], "lm_head"]
    file.write_text(json.dumps(config | {"target_modules": targets}))


def other_adapter(models):
    write_model(models / "base", dataclasses.replace(CONFIG, hidden_size=64))


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lambda m: change_config(m / "base", hidden_size=64), ["quantize", "base"], "calls for"),
        (pickle_only, ["quantize", "base"], "a pickle, which can run code and is never read"),
        (outside, ["quantize", "base"], "not a file of the folder itself"),
        (None, ["quantize", "base/model.bin"], "is a pickle"),
        (None, ["quantize", "base", "--quant-type", "nf5"], "quant_type is 'nf5'; choose one of"),
        (None, ["quantize", "base", "--quant-type", "int8"], "bitsandbytes has no 4-bit format"),
        (None, ["quantize", "base", "--blocksize", "48"], "blocksize is 48"),
        (None, ["quantize", "base", "--max-shard-size", "big"], "size 'big' is not understood"),
        (None, ["quantize", "cut.gguf"], "is truncated"),
        (None, ["quantize", "base/model.safetensors"], "give one, or, of a checkpoint"),
        (None, ["merge", "base", "base", "--mode", "original"], "adapter_config.json does not"),
        (other_adapter, ["merge", "base", "adapter", "--mode", "dequantized"], "another base"),
        (half, ["merge", "base", "adapter", "--mode", "original"], "lacks the adapter of"),
        (cut, ["merge", "base", "adapter", "--mode", "original"], "is truncated"),
        (cut, ["export", "adapter", "--format", "peft"], "is truncated"),
        (None, [*MERGE, "--tokens", "1"], "--tokens is 1, but at least 2"),
        (None, [*MERGE, "--sample", "none.txt"], "none.txt does not exist: give --sample"),
        (None, [*MERGE, "--sample", "base/model.safetensors"], "is no text in UTF-8"),
        (None, [*GGUF], "a GGUF file holds its tokenizer"),
        (None, [*GGUF, "--dtype", "float32"], "no such option: --type is that of a GGUF file"),
        (None, [*SAFETENSORS, "--type", "F32"], "no such option: --dtype is that of safetensors"),
        (None, [*PEFT, "--adapter", "adapter"], "give the adapter's folder as SOURCE"),
        (
            None,
            [*SAFETENSORS, "--adapter", "adapter", "--mode", "requantized"],
            "makes a 4-bit folder, but --format is safetensors",
        ),
        (None, [*PEFT], "base holds no adapter: --format peft"),
        (
            lambda folder: (folder / "base" / "checkpoints").mkdir(),
            [*PEFT],
            "base holds no adapter (it is a run's, but fit was given no save_adapter=): --format",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    damage, arguments, message, models, tmp_path, capsys
):
    (models / "base" / "model.bin").touch()
    (models / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes([9]) * 8)
    if damage is not None:
        damage(models)
    known = {path.name for path in models.iterdir()} | {"base/model.bin", "base/model.safetensors"}
    command, first, *rest = [str(models / a) if a in known else a for a in arguments]
    positional = [first, *rest[:1]] if command == "merge" else [first]
    options = rest[1:] if command == "merge" else rest
    before = sorted(tmp_path.rglob("*"))
    assert main([command, *positional, str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "base", "base/config.json/out"], "config.json: File exists"),
        (["push", "nowhere", "org/name", "--dry-run"], "holds no safetensors or GGUF file"),
        (["push", "base", "no name", "--dry-run"], "nor a hub name of the form org/name"),
        (["chat", "base"], "Without one, qlora-jax generate continues texts."),
        (["plan", "base", "--card", "l40", "--decode-batch", "0"], "--decode-batch is 0"),
        (["plan", "base", "--card", "l40", "--json", "no/x.json"], "there is no folder no."),
        (["plan", "broken", "--card", "l40"], "config.json is not valid JSON"),
    ],
)
def test_other_bad_input_is_one_sentence(arguments, message, models, capsys, monkeypatch):
    monkeypatch.chdir(models)
    monkeypatch.setattr("qlora_jax.cli.plan.gpu_compiler_available", lambda: True)
    (models / "broken").mkdir()
    (models / "broken" / "config.json").write_text("{")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_too_little_memory_is_one_sentence(models, capsys, monkeypatch):
    def exhausted(_):
        raise MemoryError("Unable to allocate 13.9 TiB")

    monkeypatch.setattr("qlora_jax.cli.inspect.run", exhausted)
    assert main(["inspect", str(models / "base")]) == 2
    told = "qlora-jax inspect: this machine has too little memory for that. Unable to allocate 13.9"
    assert capsys.readouterr().err.startswith(told)


def test_an_adapter_that_does_not_fit_is_seen_before_anything_is_written(models, tmp_path, capsys):
    """The drift report's first half, the model as it was trained, comes before the merged one."""
    tokenizer = shared_path("data/models/stories260K/tokenizer.model")
    write_model(models / "base", WIDER)
    shutil.copy(tokenizer, models / "base")
    on_the_head(models)
    arguments = [str(models / "base"), str(models / "adapter"), str(tmp_path / "out")]
    assert main(["merge", *arguments, "--mode", "dequantized", "--tokens", "8"]) == 2
    assert "can be merged, with `qlora-jax merge --no-report`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_drift_report_is_of_decoders(tmp_path, capsys):
    model = EncoderClassifier(ROBERTA, rngs=nnx.Rngs(0))
    save_model(tmp_path / "base", model)
    lora = LoraConfig(r=2, target_modules=("query",))
    names = module_names(FAMILIES["roberta"].weight_names(ROBERTA))
    adapted = add_lora(model, lora, rngs=nnx.Rngs(0), names=names)
    save_adapter(tmp_path / "adapter", adapted, lora, "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    arguments = ["merge", *(str(tmp_path / n) for n in ("base", "adapter", "out"))]
    assert main([*arguments, "--mode", "original"]) == 2
    assert "is a 'roberta': give --no-report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--mode", "original", "--no-report"]) == 0


def test_an_output_that_exists_is_kept(models, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(["quantize", str(models / "base"), str(tmp_path / "out")]) == 2
    assert "exists already: give a new name" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
