import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from rich.console import Console

from experiments.embedded import MODELS, ROOT
from experiments.finetune import main as finetune
from experiments.paper import glue, superni, table3
from experiments.paper.glue_tasks import TASKS, Row, load_split
from experiments.paper.superni_rows import Instance, by_task, prompt
from experiments.paper.superni_rows import load_split as load_superni
from experiments.paper.table3 import METHODS, PUBLISHED, SIZES, Cell, fill_in, read_recipe
from qlora_jax.data import ClassificationBatches, Labelled, load_tokenizer
from qlora_jax.models import EncoderDecoderConfig
from qlora_jax.train import TrainConfig
from qlora_jax.train.run_folder import check_or_write_config, describe_run
from tests.shared import shared_path

COLA = 'src\t1\t\tThe list is long.\nsrc\t0\t*\t"List the is long.\n'
QNLI = "index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tnot_entailment\n"
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tg\tf\ty\t1\ta\tb\tA plane.\tAn air plane.\t5.000\n"
)
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tTorn\n3\t4\t5\tWho?\tHe?\t1\n"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said so.\tSo he said.\n"


@pytest.fixture
def glue_folder(tmp_path):
    folder = tmp_path / "GLUE"
    files = {
        "CoLA/train.tsv": COLA * 8,
        "CoLA/dev.tsv": COLA,
        "QNLI/train.tsv": QNLI,
        "QQP/train.tsv": QQP,
        "STS-B/train.tsv": STSB,
        "STS-B/dev.tsv": STSB,
        "MRPC/train.tsv": MRPC,
        "MNLI/dev_matched.tsv": "sentence1\tsentence2\tgold_label\na\tb\tneutral\n",
        "MNLI/dev_mismatched.tsv": "sentence1\tsentence2\tgold_label\nc\td\tcontradiction\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    rows = [{"sentence": "good", "label": 1, "idx": 0}, {"sentence": "bad", "label": 0, "idx": 1}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "sst2_validation.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_glues_files_and_the_hubs_columns(glue_folder):
    # No quoting in GLUE's files: a quotation mark is a character.
    assert load_split("cola", glue_folder, "validation") == [
        (("The list is long.",), 1),
        (('"List the is long.',), 0),
    ]
    assert load_split("qnli", glue_folder, "train") == [(("Who?", "He did."), 1)]
    assert load_split("qqp", glue_folder, "train") == [(("Who?", "He?"), 1)]
    assert load_split("stsb", glue_folder, "train") == [(("A plane.", "An air plane."), 5.0)]
    assert load_split("mrpc", glue_folder, "train") == [(("He said so.", "So he said."), 1)]
    assert load_split("mnli", glue_folder, "validation_matched") == [(("a", "b"), 1)]
    assert load_split("mnli", glue_folder, "validation_mismatched") == [(("c", "d"), 2)]
    assert load_split("sst2", glue_folder, "validation") == [(("good",), 1), (("bad",), 0)]
    assert len(load_split("cola", glue_folder, "train", limit=3)) == 3
    with pytest.raises(FileNotFoundError, match="has no train file of rte: expected RTE/train"):
        load_split("rte", glue_folder, "train")
    with pytest.raises(ValueError, match="but premise or sentence1 is needed"):
        TASKS["mnli"].row({"sentence": "x", "label": 1}, "row 1")
    for label in (2, 7, -1):
        with pytest.raises(ValueError, match=f"the label is {label}, but RTE has"):
            TASKS["rte"].row({"sentence1": "x", "sentence2": "y", "label": label}, "row 1")
    for label in ("nan", "much", [5]):
        with pytest.raises(ValueError, match=r"row 1: the label is .*, but STS-B has numbers"):
            TASKS["stsb"].row({"sentence1": "x", "sentence2": "y", "label": label}, "row 1")


def test_a_copy_of_the_hubs_folder(tmp_path):
    for split in ("train", "validation_matched"):
        columns = {"premise": ["a"], "hypothesis": [split], "label": [1], "idx": [0]}
        (tmp_path / "mnli").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / f"mnli/{split}-00000-of-00001.parquet")
    assert load_split("mnli", tmp_path, "train") == [(("a", "train"), 1)]
    matched = load_split("mnli", tmp_path, "validation_matched")
    assert matched == [(("a", "validation_matched"), 1)]


def test_a_tiny_model_broken_off_is_made_again(tmp_path, monkeypatch):
    def stop(*files):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", stop)
        with pytest.raises(KeyboardInterrupt):
            superni.tiny_t5(tmp_path / "t5")
    assert load_tokenizer(superni.tiny_t5(tmp_path / "t5")).eos_token_id == 2


def test_cola_as_it_was_published():
    folder = shared_path("data/text")
    assert len(load_split("cola", folder, "train")) == 8551
    assert len(load_split("cola", folder, "validation")) == 527


def test_the_mean_of_mnlis_two_sets():
    matched, mismatched = TASKS["mnli"].validation
    references = {matched: [0, 1], mismatched: [2, 2]}
    scores = TASKS["mnli"].scores(references, {matched: [0, 0], mismatched: [2, 2]})
    assert scores["score"] == 0.75
    assert scores[f"accuracy_{matched}"] == 0.5


@pytest.mark.parametrize(
    "rows",
    # The second task has a head of another width than the base's.
    [{"stsb": 1}, pytest.param({"cola": 2, "stsb": 1}, marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_glue_resumed_and_reported(rows, glue_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (
        f"--scale tiny --tasks {' '.join(rows)} --data {glue_folder} --out {out} --steps 2 "
        "--batch-size 4 --max-len 32 --methods nf4"
    ).split()
    assert glue.main(arguments) == 0
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert [(cell["method"], cell["eval_rows"]["validation"]) for cell in cells] == [
        ("nf4", count) for count in rows.values()
    ]
    assert all(-1 <= cell["score"] <= 1 for cell in cells)
    table = (out / "table.md").read_text()
    assert "| QLoRA NF4+DQ |" in table
    assert "the base is random" in table
    capsys.readouterr()
    assert glue.main(arguments) == 0
    assert capsys.readouterr().out.count("finished before") == len(rows)
    assert glue.main([*arguments, "--r", "4"]) == 2
    assert "was made with recipe.lora.r 8, but now it is 4" in capsys.readouterr().err
    # A cell that was broken off goes on as it began, too.
    for task in rows:
        (out / f"{task}-nf4-seed0" / "result.json").unlink()
    assert glue.main([*arguments, "--alpha", "4"]) == 1
    assert capsys.readouterr().out.count("recipe.lora.alpha (was 16, is 4.0)") == len(rows)


def test_a_recipe_decides_how_a_cell_trains(monkeypatch):
    changed = {"batch_size": 8, "accumulation": 2, "epochs": 1.5, "max_grad_norm": 0.7}
    recipe = replace(glue.RECIPE, **changed, warmup=0.3, compute_dtype="float32")
    expected = TrainConfig(
        steps=12,  # 62 · 1.5 / 8 is nearer to it than to 11
        learning_rate=2e-4,
        schedule="linear",
        warmup_steps=3,  # of 3.6
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.7,
        seed=3,
        save_every=500,
        log_every=2,
    )
    assert recipe.train_config(METHODS["nf4"], rows=62, seed=3) == expected
    whole = recipe.train_config(METHODS["bf16"], rows=62, seed=3)
    assert whole == replace(expected, learning_rate=1e-5)
    told = []
    monkeypatch.setattr(table3, "load_model", lambda base, **options: told.append(options))
    for method in METHODS.values():
        recipe.load(Path("base"), method, 3, more=1)
    shared = {"compute_dtype": jnp.float32, "seed": 3, "more": 1}
    adapters = {"lora": recipe.lora, "trainable_base": False, **shared}
    assert told == [
        {"quant": None, "lora": None, "trainable_base": True, **shared},
        *({"quant": METHODS[name].quant, **adapters} for name in ("lora", "int8", "fp4", "nf4")),
    ]
    assert [method.quant and method.quant.quant_type for method in METHODS.values()] == [
        None, None, "int8", "fp4", "nf4"
    ]  # fmt: skip


def test_a_large_t5_has_the_papers_larger_rank(monkeypatch):
    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "num_layers": 24}
    config = EncoderDecoderConfig(vocab_size=32128, num_decoder_layers=24, **sizes)
    monkeypatch.setattr(superni, "read_base", lambda folder, build: config)
    for given, rank in ((None, 64), (8, 16)):
        found = superni._ranked(superni.RECIPE, Path("t5-3b"), argparse.Namespace(r=given))
        assert found == replace(superni.RECIPE, lora=replace(superni.RECIPE.lora, r=rank))


def test_a_finished_cell_is_one_of_the_same_settings(tmp_path):
    cell, made = Cell("cola", "nf4", 0), {"rows": 3, "recipe": {"r": 4}}

    def cells(settings):
        def run(cell, folder, own):
            assert own == settings
            return {"score": 0.5}

        return table3.run_cells([cell], tmp_path, lambda _: settings, run, Console(quiet=True))

    assert cells(made)[cell]["score"] == 0.5
    assert cells(made)[cell]["settings"] == made
    for other, words in (
        ({"rows": 3, "recipe": {"r": 8}}, "recipe.r 4, but now it is 8"),
        ({**made, "model": "new"}, "model None, but now it is 'new'"),
        ({"recipe": {"r": 4}}, "rows 3, but now it is None"),
    ):
        with pytest.raises(ValueError, match=f"was made with {words}: set it back"):
            cells(other)


@pytest.mark.parametrize(
    ("module", "options"),
    [(glue, "--tasks stsb --max-len 32"), (superni, "--held-out-tasks 1")],
    ids=["glue", "superni"],
)
def test_a_cell_broken_off_does_not_go_on_with_other_rows(
    module, options, glue_folder, tmp_path, monkeypatch, capsys
):
    """Other settings, or another file of the same name."""
    flat = tmp_path / "rows.jsonl"
    flat.write_text("\n".join(map(json.dumps, superni_rows(4))))

    def fit(model, batches, config, *, run_folder, identity, identity_defaults, **_):
        started, described = (run_folder / "config.json").exists(), describe_run(config, identity)
        check_or_write_config(run_folder, described, started=started, defaults=identity_defaults)
        raise RuntimeError("broken off")

    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(table3.Recipe, "load", lambda *_, **__: None)
    data = glue_folder if module is glue else flat
    line = f"--scale tiny --methods nf4 --data {data} --out {tmp_path / 'out'} --steps 2 {options}"

    def told(*more: str) -> str:
        assert module.main([*line.split(), *more]) == 1
        return " ".join(capsys.readouterr().out.split())

    assert "broken off" in told()
    assert "train_rows (was 64, is 1)" in told("--train-rows", "1")
    if module is superni:
        flat.write_text("\n".join(map(json.dumps, superni_rows(5))))
        assert "rows (was 'sha256:" in told()
    # An older version kept less in mind.
    (config,) = (tmp_path / "out").glob("*-nf4-seed0/config.json")
    before = json.loads(config.read_text())
    del before["run"]["rows"], before["run"]["train_rows"]
    config.write_text(json.dumps(before))
    assert "broken off" in told("--train-rows", "1")


def test_tables_hold_means_over_seeds_and_over_all_tasks():
    scores = {("cola", "nf4", 0): 0.5, ("cola", "nf4", 1): 0.7, ("rte", "nf4", 0): 0.9}
    results = {Cell(*cell): {"score": score} for cell, score in scores.items()}
    assert "| QLoRA NF4+DQ | 60.0 | 90.0 | 75.0 | – |\n" in glue.table(results, ["cola", "rte"])
    # Of some tasks there is no mean.
    partial = glue.table(results, ["cola", "rte", "sst2"])
    assert "| QLoRA NF4+DQ | 60.0 | 90.0 | – | – | – |\n" in partial
    scores = enumerate((0.2, 0.3, 0.7))
    results = {Cell("t5", "bf16", seed): {"score": score} for seed, score in scores}
    assert "| BF16 | 40.0 | 40.1 | 42.1 | 48.0 | 54.3 | 62.0 |\n" in superni.table(results, ["t5"])
    asked = [Instance(task, "", (), "", ("a",)) for task in "bab"]
    assert by_task(asked, [0.5, 1.0, 0.75]) == {"a": 1.0, "b": 0.625}
    # What goes into the mean.
    assert {name: task.score for name, task in TASKS.items() if task.score != "accuracy"} == {
        "cola": "matthews", "stsb": "pearson"
    }  # fmt: skip


def test_short_rows_are_padded_little():
    rows = [Row(("A list. " * times,), 0) for times in (1, 10, 60)]
    tokenizer = load_tokenizer(ROOT / "tokenizer")
    batches = glue._batches(rows, tokenizer, 100, batch_size=1)
    assert {batch.input_ids.shape for batch in batches.one_epoch()} == {(1, 32), (1, 64), (1, 100)}


@pytest.mark.parametrize("outputs", [1, 3])
def test_predictions_are_of_each_row_in_order(outputs):
    class Scores(nnx.Module):
        def __call__(self, ids, mask):
            return jax.nn.one_hot(ids[:, 0] % 3, outputs) * ids[:, :1]

    examples = [Labelled(np.full(1, n, np.int32), 0) for n in (3, 7, 4, 8, 5)]
    batches = ClassificationBatches(examples, batch_size=2, pad_token_id=1, shuffle=False)
    found = glue.predict(Scores(), batches).tolist()
    assert found == ([3, 0, 0, 0, 0] if outputs == 1 else [0, 1, 1, 2, 2])


def superni_rows(tasks: int) -> list[dict]:
    return [
        {"topic": f"task{t}", "instruction": "Repeat.", "input": f"{t} {i}", "output": ["a", "b"]}
        for t in range(tasks)
        for i in range(4)
    ]


def test_superni_prompts_and_tasks(tmp_path):
    instance = Instance("t", "Add. ", (("1 1", "2"), ("2 2", "4"), ("3 3", "6")), "4 4", ("8",))
    assert prompt(instance) == (
        "Definition: Add.\n\nPositive Example 1 -\nInput: 1 1\nOutput: 2\n\n"
        "Positive Example 2 -\nInput: 2 2\nOutput: 4\n\n"
        "Now complete the following example -\nInput: 4 4\nOutput: "
    )
    flat = tmp_path / "rows.jsonl"
    flat.write_text("\n".join(map(json.dumps, superni_rows(5))))
    train, test = load_superni(flat, per_task=3, held_out_tasks=2)
    assert (len(train), len(test)) == (9, 6)
    assert not {i.task for i in train} & {i.task for i in test}
    assert test[0].references == ("a", "b")
    # The same tasks, however the rows lie.
    flat.write_text("\n".join(map(json.dumps, superni_rows(5)[::-1])))
    _, again = load_superni(flat, per_task=3, held_out_tasks=2)
    assert {i.task for i in again} == {i.task for i in test}
    with pytest.raises(ValueError, match="has 5 tasks, but 5 are to be held out"):
        load_superni(flat, per_task=3, held_out_tasks=5)
    flat.write_text(json.dumps({"instruction": "x", "input": "y", "output": "z"}))
    with pytest.raises(ValueError, match="has the columns instruction, input, output, but topic"):
        load_superni(flat, per_task=3, held_out_tasks=0)
    whole = {"task": "t", "instruction": "x", "input": "y", "output": "z"}
    flat.write_text(json.dumps(whole))
    assert load_superni(flat, per_task=3, held_out_tasks=0)[0][0].task == "t"
    for odd in ({"output": []}, {"output": 5}, {"output": ["a", None]}, {"input": 5}, {"task": 5}):
        flat.write_text(json.dumps(whole | odd))
        with pytest.raises(ValueError, match=r"row 0 .* are needed as texts, and output as a text"):
            load_superni(flat, per_task=3, held_out_tasks=0)


def test_superni_from_the_repository(tmp_path):
    (tmp_path / "splits" / "default").mkdir(parents=True)
    (tmp_path / "tasks").mkdir()
    for split, name in (("train", "task1_a"), ("test", "task2_b")):
        (tmp_path / "splits" / "default" / f"{split}_tasks.txt").write_text(f"{name}\n")
        task = {
            "Definition": ["Say it."],
            "Positive Examples": [{"input": "x", "output": "y", "explanation": ""}],
            "Instances": [{"id": str(i), "input": str(i), "output": ["o"]} for i in range(5)],
        }
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(task))
    train, test = load_superni(tmp_path, per_task=4, held_out_tasks=0)
    assert (len(train), len(test)) == (4, 4)
    assert train[0].examples == (("x", "y"),)
    (tmp_path / "tasks" / "task2_b.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_tasks.txt names it"):
        load_superni(tmp_path, per_task=4, held_out_tasks=0)


@pytest.mark.slow
def test_superni_and_finetune_on_a_tiny_t5(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, superni_rows(4))))
    out = tmp_path / "out"
    arguments = (
        f"--scale tiny --data {rows} --out {out} --methods bf16 nf4 --steps 2 --batch-size 4 "
        "--held-out-tasks 1 --eval-rows 3 --source-max-len 64 --target-max-len 4"
    ).split()
    assert superni.main(arguments) == 0
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert [cell["method"] for cell in cells] == ["bf16", "nf4"]
    assert all(0 <= cell["score"] <= 1 and len(cell["tasks"]) == 1 for cell in cells)
    assert "| BF16 | 0.0 | 40.1 |" in (out / "table.md").read_text()
    # A cell that was broken off while it answered does not go on by another recipe.
    for method in ("bf16", "nf4"):
        (out / f"tiny-t5-{method}-seed0" / "result.json").unlink()
    capsys.readouterr()
    assert superni.main([*arguments, "--alpha", "4"]) == 1
    assert "recipe.lora.alpha (was 64, is 4.0)" in capsys.readouterr().out
    # The same model through the ordinary command, with the paper's adapters for its size.
    settings = {
        "train.steps": 1,
        "train.micro_batch_size": 4,
        "data.validation_rows": 4,
        "data.buckets": "[64]",
        "model.compute_dtype": "float32",
    }
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    lines = [{"input": row["input"], "output": "a"} for row in superni_rows(4)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    run = tmp_path / "run"
    model = str(out / "tiny-t5")
    assert finetune(["--model", model, "--data", str(rows), "--out", str(run), *flags]) == 0
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 64)
    noisy = ["--set", "train.neftune_noise_alpha=5", "--out", str(tmp_path / "noisy")]
    assert finetune(["--model", model, "--data", str(rows), *flags, *noisy]) == 2
    assert "that noise is a decoder's: leave it out" in capsys.readouterr().err
    capsys.readouterr()


def test_what_the_paper_published():
    assert list(METHODS) == list(PUBLISHED)
    assert PUBLISHED["nf4"] == {"80M": 40.4, "250M": 42.7, "780M": 47.7, "3B": 55.3, "11B": 60.9}
    assert all(set(SIZES) <= set(row) for row in PUBLISHED.values())


@pytest.mark.parametrize("command", [glue.main, superni.main])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--steps 0", "0 is too few: give 1 or more"),
        ("--batch-size 0", "0 is too few"),
        ("--accumulation 0", "0 is too few"),
        ("--r -1", "-1 is too few"),
        ("--train-rows -1", "-1 is too few"),
        ("--eval-rows 0", "0 is too few"),
        ("--steps 3 --epochs 1", "not allowed with argument --steps"),
        ("--epochs 0", "epochs=0.0 must be a finite number above 0"),
        ("--epochs nan", "epochs=nan must be"),
        ("--alpha inf", "alpha is inf; give a finite number"),
        ("--learning-rate nan", "learning_rate=nan must be"),
        ("--full-learning-rate -1", "learning_rate=-1.0 must be"),
        ("--batch-size 8 --accumulation 3", "accumulation=3 has to divide batch_size=8"),
    ],
)
def test_options_that_no_cell_can_train_by(command, options, words, tmp_path, capsys):
    out = tmp_path / "o"
    try:
        status = command(["--data", str(tmp_path), "--out", str(out), *options.split()])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_epochs_at_tiny_scale_are_not_overruled_by_its_steps():
    for half, more in ((glue, []), (superni, ["--data", "x"])):
        options = half.make_parser().parse_args(["--epochs", "2", *more])
        fill_in(options, half.TINY)
        assert (options.epochs, options.steps, options.batch_size) == (2, None, 8)
        recipe = read_recipe(half.RECIPE, options)
        assert recipe.train_config(METHODS["nf4"], rows=64, seed=0).steps == 16


def test_refusals(glue_folder, tmp_path, capsys):
    assert superni.main(["--data", str(tmp_path / "nothing.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err
    out = tmp_path / "o"
    tiny = f"--scale tiny --data {glue_folder} --out {out}".split()
    assert glue.main([*tiny, "--tasks", "rte"]) == 2
    assert "has no train file of rte" in capsys.readouterr().err
    with (glue_folder / "CoLA" / "dev.tsv").open("a", encoding="utf-8") as file:
        file.write("src\t7\t\tAn odd label.\n")
    assert glue.main([*tiny, "--tasks", "cola"]) == 2
    assert "row 3 of" in capsys.readouterr().err
    assert not out.exists()
    (glue_folder / "CoLA" / "dev.tsv").write_text(COLA, encoding="utf-8")
    llama = str(MODELS["stdlib-1m"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, superni_rows(14))))
    for command, words in (
        ([glue.main, *tiny, "--tasks", "cola", "--model", llama], "is a 'llama', but an Encoder"),
        (
            [glue.main, "--tasks", "cola", "--data", str(glue_folder / "CoLA" / "train.tsv")],
            "one file, which cannot hold both splits",
        ),
        ([glue.main, *tiny, "--tasks", "cola", "--max-len", "130"], "reads 129 tokens"),
        ([glue.main, *tiny, "--tasks", "cola", "cola"], "cola-bf16-seed0 is asked for 2 times"),
        ([superni.main, "--data", str(rows), "--models", llama], "is a 'llama', but an Encoder"),
        (
            [superni.main, "--data", str(rows), "--models", llama, f"{llama}/../stdlib-1m"],
            "two of --models are called stdlib-1m",
        ),
    ):
        main, *arguments = command
        assert main([*arguments, "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
    assert not list(out.rglob("result.json"))
