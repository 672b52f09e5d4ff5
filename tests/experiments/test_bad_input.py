"""Each mistake ends in one sentence and exit status 2, before anything is computed or written."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from experiments import finetune, run, sweep
from qlora_jax.plan import memory


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(run, "load_pretrained", refuse)


def sentence(capsys: pytest.CaptureFixture) -> str:
    """What stands on standard error: one line."""
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data(tiny_model, tmp_path, capsys):
    odd = write_rows(tmp_path / "odd.jsonl", [{"question": "a", "reply": "b"}] * 300)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    few = write_rows(tmp_path / "few.jsonl", [{"input": "a", "output": "b"}] * 5)
    long = write_rows(tmp_path / "long.jsonl", [{"input": "a", "output": "b " * 700}] * 9)
    blank = write_rows(tmp_path / "blank.jsonl", [{"input": "a", "output": 3}] * 9)
    talk = write_rows(tmp_path / "talk.jsonl", [{"input": "a b c d e f", "output": "g h i"}] * 300)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"input": "café", "output": "b"}\n'.encode("latin-1") * 9)
    plain = tmp_path / "plain.txt"
    plain.write_text("a line\n" * 9)
    cases = [
        ([odd], "has the columns question, reply"),
        ([odd, "data.format=alpaca"], "needs instruction, output"),
        ([odd, "data.format=alpac"], "there is no prompt format 'alpac'"),
        ([empty], "is empty"),
        ([few], "5 rows, but 200 are to be held out"),
        ([few, "data.validation_split=test"], "test"),
        (["Alpacca"], "the nearest of these is alpaca (there are describe, "),
        ([few, "data.validation_source=chats"], "the nearest of these is chat"),
        ([few, "data.name=main"], "is a file, which has no configuration 'main'"),
        (["alpaca", "data.name=main"], "brings its own configuration"),
        (["alpaca", "data.columns.output=answer"], "whose columns are known"),
        ([few, "data.columns.output=answer"], "has no column 'answer'"),
        ([few, "data.columns=answer"], "but should be a section of names and values"),
        ([few, "data.validation_rows=1", "data.max_rows=0"], "max_rows=0 must be 1 or more"),
        ([few, "data.validation_rows=0"], "validation_rows=0 must be 1 or more"),
        ([few, "data.buckets=[]"], "must be lengths of 1 token or more"),
        ([few, "data.buckets=[-8]"], "must be lengths of 1 token or more"),
        ([""], "source is empty"),
        *(
            ([few, f"data.{name}=''"], f"{name} is empty: give a name")
            for name in ("name", "split", "validation_source", "validation_split")
        ),
        *(
            ([few, f"data.{name}=0"], f"{name}=0 must be 1 or more")
            for name in ("max_len", "source_max_len", "target_max_len")
        ),
        ([few, "data.target_max_len=automatic"], "should be a whole number or auto"),
        ([long, "data.validation_rows=1", "data.target_max_len=null"], "at most 512 are allowed"),
        # The number counts rows that are left after some were drawn; the row itself is shown.
        ([blank, "data.validation_rows=1"], "The row: {'input': 'a', 'output': 3}"),
        ([talk, "data.buckets=[8]"], "tokens, but data.buckets holds at most 8: raise"),
        (
            [talk, "data.packing=true", "data.packed_length=8"],
            "tokens, but data.packed_length holds at most 8",
        ),
        ([latin, "data.validation_rows=1"], "latin.jsonl cannot be read as a dataset"),
        ([plain, "data.validation_rows=1"], "name the one you mean as the format (data.format"),
        ([tmp_path / "absent.jsonl"], "does not exist"),
    ]
    for (data, *settings), words in cases:
        flags = [flag for setting in settings for flag in ("--set", setting)]
        command = ["--model", str(tiny_model), "--data", str(data), "--out", str(tmp_path / "o")]
        assert finetune.main([*command, *flags]) == 2
        assert words in sentence(capsys)
    assert not (tmp_path / "o").exists()


def test_models(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bare = tmp_path / "bare"
    bare.mkdir()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "mamba"}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    short = tmp_path / "short"
    short.mkdir()
    for file in tiny_model.iterdir():
        content = file.read_bytes()
        cut = content[: len(content) // 2] if file.suffix == ".safetensors" else content
        (short / file.name).write_bytes(cut)
    cases = [
        (tmp_path / "nowhere", "neither a folder here nor"),
        (bare, "config.json"),
        (strange, "model_type 'mamba'"),
        (broken, "JSON"),
        (short, "is truncated"),
    ]
    for model, words in cases:
        command = ["--model", str(model), "--data", "describe", "--out", str(tmp_path / "o")]
        assert finetune.main(command) == 2
        assert words in sentence(capsys)
    assert not (tmp_path / "o").exists()


def test_options_and_files(tiny_model, tmp_path, capsys):
    typo = tmp_path / "typo.yaml"
    typo.write_text("train: {learning_rat: 1.0e-3}\n")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    for command in (finetune.main, sweep.main):
        flags = [str(typo)] if command is sweep.main else ["--config", str(typo)]
        assert command(flags) == 2
        assert "the nearest is train.learning_rate" in sentence(capsys)
        folder = [str(tmp_path)] if command is sweep.main else ["--config", str(tmp_path)]
        assert command(folder) == 2
        assert f"is a folder, but a configuration is a file: give {typo}" in sentence(capsys)
        models = "--models" if command is sweep.main else "--model"
        assert command([models, "stdlib-2m", "--out", str(tmp_path / "o")]) == 2
        assert "the nearest of these is stdlib-" in sentence(capsys)
        assert command([models, str(lora), "--out", str(tmp_path / "o")]) == 2
        assert f"holds no model: {lora} is an adapter, which goes with" in sentence(capsys)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "not.yaml").write_text("a: [")
    for name, words in (
        ("list.yaml", "should hold keys and values"),
        ("not.yaml", "is not valid YAML"),
        ("no.yaml", "has list.yaml, not.yaml, typo.yaml"),
    ):
        assert sweep.main([str(tmp_path / name)]) == 2
        assert words in sentence(capsys)
    assert sweep.main(["--set", "steps"]) == 2
    assert "key=value" in sentence(capsys)
    assert sweep.main(["--axis", "lora.r"]) == 2
    assert "--axis 'lora.r' should read key=value" in sentence(capsys)
    for idle, words in (
        (["--compile"], "--compile is given, but belongs to --dry-run"),
        (["--cards", "h100"], "--cards is given, but belongs to --dry-run"),
        (["--scale", "tiny"], "--scale is given, but belongs to --preset"),
        (["--rows", str(tmp_path)], "--rows is given, but belongs to --preset"),
        (["--report-only", "--out", str(tmp_path / "o")], "there is no folder"),
        (["--axis", "lora.r=4,[16"], "the value of --axis 'lora.r' is not valid YAML"),
        (["--axis", "lora.r=4,8", "--set", "lora.r=2"], "lora.r=2 and lora.r=4,8 are both given"),
        (
            ["--set", "train.seed=3"],
            "set, but a sweep's cells have theirs from seeds",
        ),
        (["--axis", "train.seed=1,2"], "have theirs from seeds (--seeds)"),
        (["--set", "model=stdlib-4m"], "have theirs from models (--models)"),
        (["--axis", "data.source=chat,describe"], "have theirs from datasets"),
    ):
        assert sweep.main(idle) == 2
        assert words in sentence(capsys)
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["--dry-run", "--overwrite"])
    assert "not allowed with argument" in capsys.readouterr().err
    assert sweep.main(["--models", str(tiny_model), "--only", "nothing-like-this"]) == 2
    assert "matches no cell" in sentence(capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: 5", "train in {file} is 5, but should be a section"),
        ("axes: {method: {QLoRA: 3}}", "axes.method.QLoRA in {file} is 3"),
        ("axes: {1: [2]}", "there is no option 1"),
        ("rules: [{when: 3, set: {}}]", "a rule's when in {file} is 3"),
        ("rules: [{when: {}, set: 3}]", "a rule's set in {file} is 3"),
        ("name: ../elsewhere", "is '../elsewhere', but a folder in runs/ is called by it"),
        ("axes: 5", "axes in {file} is 5, but should be a section"),
        ("train: {steps: 2024-13-45}", "{file} is not valid YAML: month must be in 1..12"),
        ("rules: [{when: {}, set: {model: x}}]", "model is set, but a sweep's cells have theirs"),
        ("train: {steps: 3}\ntrain: {seed: 4}", "the key train stands twice in one section"),
        ("lora: {r: 4, r: 8}", "the key r stands twice"),
        ("seeds: [0, 0.0]", "makes two cells called describe--stdlib-1m--seed0"),
        ("seeds: [1.5]", "a seed in {file} is 1.5, but should be a whole number"),
        ("seeds: [0, 0]", "makes two cells called describe--stdlib-1m--seed0"),
    ],
)
def test_a_sweeps_file(text, words, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert sweep.main([str(file)]) == 2
    assert words.format(file=file) in sentence(capsys)


def test_a_sweeps_file_is_no_single_runs(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("models: [stdlib-1m]\nseeds: [0, 1]\n")
    assert finetune.main(["--config", str(file)]) == 2
    assert "has models, seeds, as a sweep's file: give it to python -m" in sentence(capsys)


def test_an_axis_of_the_file_is_not_overruled_in_silence(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("axes: {lora.r: [4, 8], method: {QLoRA: {}, LoRA: {quant: null}}}\n")
    assert sweep.main([str(file), "--set", "lora.r=16"]) == 2
    assert "lora.r is set, but the axis lora.r sets it in every cell" in sentence(capsys)
    # The cells of QLoRA heed this one.
    options = sweep.make_parser().parse_args([str(file), "--set", "quant.blocksize=32"])
    blocksizes = [c.run.quant and c.run.quant.blocksize for c in sweep.read_sweep(options).cells]
    assert blocksizes == [32, None, 32, None]
    options = sweep.make_parser().parse_args([str(file), "--axis", "lora.r=2"])
    assert {cell.run.lora.r for cell in sweep.read_sweep(options).cells} == {2}
    file.write_text("axes: 5\n")
    assert sweep.main([str(file), "--axis", "lora.r=2"]) == 2
    assert "but should be a section" in sentence(capsys)


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("model: stdlib-4M", "model 'stdlib-4M', which no cell is called by: there are stdlib-1m"),
        ("dataset: [chat, describe]", "dataset 'describe'"),
        ("seed: 1", "seed '1', which no cell is called by: there is 0."),
        ("quant: nf4", "quant 'nf4', which no cell is called by: there is none."),
    ],
)
def test_a_rule_for_no_cell_is_refused(when, words, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    lists = "models: [stdlib-1m, stdlib-4m]\ndatasets: [chat]\naxes: {quant: [null]}\n"
    file.write_text(f"{lists}rules: {{when: {{{when}}}, set: {{lora.r: 2}}}}\n")
    assert sweep.main([str(file), "--dry-run"]) == 2
    assert words in sentence(capsys)


def test_a_rule_may_be_for_what_a_command_leaves_out_or_brings(tmp_path):
    file = tmp_path / "a.yaml"
    rule = "{{when: {{{}}}, set: {{lora.r: {}}}}}".format
    rules = ", ".join(map(rule, ("model: stdlib-4m", "seed: 7", "lora.bias: none"), (2, 3, 4)))
    file.write_text(
        f"models: [stdlib-1m, stdlib-4m]\naxes: {{lora.bias: [all]}}\nrules: [{rules}]\n"
    )
    command = f"{file} --models stdlib-1m --seeds 0 7 --axis lora.bias=all,none"
    options = sweep.make_parser().parse_args(command.split())
    assert [cell.run.lora.r for cell in sweep.read_sweep(options).cells] == [64, 3, 4, 4]


def test_a_rule_is_for_the_values_of_an_axis(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "axes: {quant.double_quant: [true, false]}\n"
        "rules: {when: {quant.double_quant: true}, set: {lora.r: 2}}\n"
    )
    options = sweep.make_parser().parse_args([str(file)])
    assert [cell.run.lora.r for cell in sweep.read_sweep(options).cells] == [2, 64]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 3 --set train.seed=4", "train.seed=3 and train.seed=4"),
        ("--model stdlib-1m --set model=stdlib-4m", "model.source=stdlib-1m and model=stdlib-4m"),
        ("--data chat --set data.source=describe", "data.source=chat and data.source=describe"),
        # The second had made a section with the default's source, or of 4 bits, of the first.
        ("--set model=stdlib-4m --set model.remat=none", "model=stdlib-4m and model.remat=none"),
        ("--set quant=null --set quant.blocksize=32", "quant=None and quant.blocksize=32"),
    ],
)
def test_two_flags_about_one_option(flags, words, capsys):
    assert finetune.main(["--print-config", *flags.split()]) == 2
    assert words in sentence(capsys)


def test_what_is_said_twice_is_said_once_and_the_last_set_counts(capsys):
    flags = "--seed 3 --set train.seed=3 --set lora.r=8 --set lora.r=4 --print-config"
    assert finetune.main(flags.split()) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["train"]["seed"], tree["lora"]["r"]) == (3, 4)


def test_a_model_by_name_in_a_file_keeps_its_name_beside_options(tiny_model, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {tiny_model}\ndata: chat\n")
    flags = ["--config", str(file), "--set", "model.remat=none", "--set", "data.max_rows=8"]
    assert finetune.main([*flags, "--print-config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["model"]["source"] == str(tiny_model)
    assert tree["model"]["remat"] == "none"
    assert tree["data"]["source"] == "chat"


def test_attention_that_this_machine_has_not(tiny_model, tmp_path, capsys):
    command = ["--model", str(tiny_model), "--out", str(tmp_path / "o")]
    assert finetune.main([*command, "--set", "model.attention=cudnn"]) == 2
    assert "this machine computes on cpu" in sentence(capsys)
    half = ["--set", "model.attention=xla", "--set", "model.compute_dtype=float16"]
    assert finetune.main([*command, *half]) == 2
    assert "whose product in float16 a CPU has not" in sentence(capsys)


def test_what_fails_in_the_run_is_a_sentence_and_a_traceback_in_its_folder(
    tiny_model, tmp_path, capsys, monkeypatch
):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "adapter")

    monkeypatch.setattr(run, "load_pretrained", full)
    out = tmp_path / "o"
    assert finetune.main(["--model", str(tiny_model), "--data", "chat", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: adapter: No space left on device\n")
    assert str(out / "error.txt") in error
    # A sweep's report shows the first line.
    assert (out / "error.txt").read_text().startswith("adapter: No space left on device\n\nTrace")


def test_output_folders(tiny_model, tmp_path, capsys):
    file = tmp_path / "a file"
    file.touch()
    data = ["--data", "describe", "--model", str(tiny_model)]
    assert finetune.main([*data, "--out", str(file / "run")]) == 2
    assert "cannot be written" in sentence(capsys)
    assert sweep.main(["--models", str(tiny_model), "--out", str(file / "runs")]) == 2
    assert "cannot be written" in sentence(capsys)
    assert file.read_text() == ""


@pytest.mark.parametrize("command", [finetune, sweep])
def test_overwrite_deletes_nothing_where_wandb_is_missing(
    command, tiny_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder, out = tmp_path / "out", tmp_path / "out"
    flags = ["--data", "describe", "--model"]
    if command is sweep:
        folder, flags = out / "describe--tiny--seed0", ["--datasets", "describe", "--models"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    file = tmp_path / "a.yaml"
    file.write_text("{}")
    where = [str(file)] if command is sweep else []
    command_line = [*where, *flags, str(tiny_model), "--out", str(out), "--overwrite"]
    assert command.main([*command_line, "--wandb", "project"]) == 2
    assert "--wandb needs the package wandb: pip install 'qlora-jax[wandb]'" in sentence(capsys)
    assert (folder / "config.json").exists()


def test_an_interrupt_while_a_sweep_is_read_is_told(tiny_model, tmp_path, capsys, monkeypatch):
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "plan", stop)
    assert sweep.main(["--models", str(tiny_model), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_plan_for_what_is_not_installed_is_refused(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(memory, "cudnn_available", lambda: False)
    command = ["--models", str(tiny_model), "--dry-run", "--compile", "--cards", "l40"]
    assert sweep.main([*command, "--set", "model.attention=cudnn"]) == 2
    assert "which only cuDNN compiles: pip install" in sentence(capsys)


def test_one_wrong_cell_refuses_the_sweep_before_the_first_runs(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--models", str(tiny_model), str(tmp_path / "absent"), "--out", str(out)]
    assert sweep.main(command) == 2
    assert "neither a folder here nor" in sentence(capsys)
    assert not out.exists()


def test_adapters_that_the_model_has_no_place_for_refuse_the_sweep(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--models", str(tiny_model), "--out", str(out)]
    names_none = "({!r},), which names no".format
    for axis, words in (
        ("lora.target_modules=[[q_proj], [c_attn]]", f"target_modules is {names_none('c_attn')}"),
        ("lora.modules_to_save=[[norm], [wte]]", f"modules_to_save is {names_none('wte')}"),
        ("lora.init_lora_weights=[loftq, pissa]", "which makes good what quantization lost"),
    ):
        without = ["--set", "quant=null"] if "loftq" in axis else []
        assert sweep.main([*command, "--axis", axis, *without]) == 2
        assert words in sentence(capsys)
    assert not out.exists()
