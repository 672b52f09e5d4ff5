"""Configurations: what a file says becomes a run, and what it says wrongly is refused by name."""

import math
from pathlib import Path

import pytest
import yaml

from experiments.cells import build_sweep
from experiments.cli import CONFIGS
from experiments.config import RunConfig, build_run
from experiments.embedded import DATASETS, MODELS
from experiments.finetune import default_folder, make_parser, read_run
from experiments.paper.superni import tiny_t5
from experiments.sweep import with_adapters
from experiments.tree import (
    USUAL_NAMES,
    differences,
    flat,
    parse_setting,
    read_yaml,
    to_tree,
    to_yaml,
    with_setting,
)
from qlora_jax.quant import QuantConfig

RANKS = {"layers.0.self_attn.q_proj": 2}


def test_defaults_are_the_papers():
    run = build_run({}, "nothing")
    assert run.quant.quant_type == "nf4"
    assert run.quant.double_quant
    assert (run.lora.r, run.lora.alpha) == (64, 16)
    assert (run.train.learning_rate, run.train.b2, run.train.max_grad_norm) == (2e-4, 0.999, 0.3)
    assert run.train.batch_size == 16


def test_a_resolved_run_comes_back_from_its_yaml():
    tree = {
        "model": {"source": "some/model", "compute_dtype": "float32"},
        "data": "chat",
        "quant": None,
        "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"], "dtype": "bfloat16"},
        "train": {"steps": "1e2", "learning_rate": "1e-3", "max_grad_norm": None},
    }
    run = build_run(tree, "a test")
    assert (run.train.steps, run.train.learning_rate) == (100, 1e-3)
    assert run.data.validation_split == "validation"
    assert build_run(yaml.safe_load(to_yaml(run)), "its yaml") == run
    assert differences(run, run) == []
    assert differences(build_run(with_setting(tree, "lora.r", 16), "x"), run) == [
        "lora.r: 16, was 8"
    ]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"trian": {}}, "the nearest is train"),
        ({"train": {"learning_rat": 1e-3}}, "the nearest is train.learning_rate"),
        ({"lora": {"rank": 8}}, r"no option lora\.rank .*the nearest is lora\.r, and there"),
        ({"rank": 8}, r"the nearest is lora\.r, and there are model"),
        ({"lora": {"dropout": 0.1}}, "the nearest is lora.lora_dropout"),
        ({"train": {"lr": 1e-3}}, "the nearest is train.learning_rate"),
        ({"train": {"batch_size": 4}}, "the nearest is train.micro_batch_size"),
        ({"train": {"num_train_epochs": 1}}, "the nearest is train.steps"),
        ({"train": {"early_stopping": 3}}, "the nearest is train.patience"),
        ({"quant": {"blocksiz": 64}}, "the nearest is quant.blocksize"),
        ({"train": {"steps": "many"}}, "train.steps in a test is 'many', but should be a whole"),
        ({"train": {"steps": 1.5}}, "should be a whole number"),
        ({"train": {"epochs": 2}}, r"no option train\.epochs .*there are train\.steps, "),
        ({"quant": "none"}, "quant in a test is 'none': in YAML that is null"),
        ({"data": {"max_rows": "None"}}, "max_rows in a test is 'None': in YAML that is null"),
        *(
            ({"train": {"steps": odd}}, f"steps in a test is {odd!r}, but should be a whole")
            for odd in (math.inf, math.nan, "1e400")
        ),
        ({"train": {"learning_rate": 10**400}}, "but should be a number"),
        ({"train": 3}, "train in a test is 3, but should be a section"),
        ({"quant": {"quant_type": "nf5"}}, "quant_type is 'nf5'"),
        ({"model": {"compute_dtype": "int8"}}, "should be one of bfloat16, float32, float16"),
        ({"lora": {"dtype": "float12"}}, "a dtype such as float32"),
        ({"lora": {"dtype": None}}, "a dtype such as float32"),
        ({"lora": {"dtype": []}}, "a dtype such as float32"),
        ({"lora": {"dtype": "float16"}}, "eps=1e-08, by which AdamW divides, is 0 in lora.dtype"),
        ({"mmlu": {"split": "dev"}}, "whose questions are shown with their answers"),
        ({"mmlu": {"shots": 6}}, "shots=6 must be 0 to 5"),
        ({"mmlu": {"batch_size": 0}}, "batch_size=0 must be 1 or more"),
        ({"mmlu": {"limit": 0}}, "limit=0 must be 1 or more; null asks all"),
        ({"devices": {"count": 3}}, "devices.count=3 does not divide train.micro_batch_size=16"),
        ({"model": {"loss_chunk": 0}}, "loss_chunk=0 must be 1 token or more; null for all"),
        ({"quant": None, "lora": {"init_lora_weights": "loftq"}}, "but quant is null: leave one"),
        ({"data": 7}, "describe, implement, chat"),
        ({"data": {"group_by_length": "yes please"}}, "should be true or false"),
    ],
)
def test_what_is_wrong_is_named(tree, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        build_run(tree, "a test")
    assert "\n" not in str(caught.value)


def test_every_option_survives_the_round_trip():
    tree = to_tree(RunConfig())
    sections = {"model", "data", "quant", "lora", "train", "devices", "mmlu", "rouge"}
    assert {key.split(".")[0] for key in flat(tree)} == sections
    assert build_run(tree, "defaults") == build_run({}, "nothing")


def test_settings():
    assert parse_setting("train.steps=10") == ("train.steps", 10)
    assert parse_setting("quant=null") == ("quant", None)
    assert with_setting({"quant": None}, "quant.blocksize", 128) == {"quant": {"blocksize": 128}}
    with pytest.raises(ValueError, match="key=value"):
        parse_setting("train.steps")
    for wrong in ("[", "2024-13-45", "[" * 5000, "{? [a] : b}", "{a: 1, a: 2}"):
        with pytest.raises(ValueError, match=r"the value of --set .* is not valid YAML: "):
            parse_setting(f"train.steps={wrong}")
    sixteen = {"lora": {"dtype": "float16"}, "train": {"master_weights": True}}
    assert build_run(sixteen, "a test").train.master_weights
    assert type(build_run({"model": {"embedding_bits": 8.0}}, "a test").model.embedding_bits) is int


def test_flags_win_over_the_file():
    flags = f"--config {CONFIGS / 'finetune.yaml'} --model stdlib-4m --seed 3 --set lora.r=4"
    options = make_parser().parse_args(flags.split())
    run = read_run(options)
    assert (run.model.source, run.model.compute_dtype) == ("stdlib-4m", "float32")
    assert (run.train.seed, run.lora.r, run.data.source) == (3, 4, "describe")


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "rows/my.v2.jsonl", "Qwen2.5-0.5B-my.v2-seed3"),
        ("models/llama-3.2/", "tatsu-lab/alpaca", "llama-3.2-alpaca-seed3"),
        ("stdlib-1m", "describe", "stdlib-1m-describe-seed3"),
    ],
)
def test_runs_of_two_models_have_two_folders(model, data, name):
    run = build_run({"model": model, "data": data, "train": {"seed": 3}}, "a test")
    assert default_folder(run) == Path("runs/finetune") / name


# ------------------------------------------------------------------ sweeps


def test_the_file_of_one_run_is_a_sweep_of_one_cell_with_its_seed():
    (cell,) = build_sweep({"data": "chat", "train": {"seed": 5, "steps": 3}}, "a test").cells
    assert (cell.run.train.seed, cell.labels["seed"]) == (5, "5")


def test_cells_are_the_product_of_all_lists():
    sweep = build_sweep(
        {
            "models": ["stdlib-1m", "a/b"],
            "datasets": {"describe": {}, "mine": {"source": "x.json", "target_max_len": 9}},
            "seeds": [0, 1, 2],
            "axes": {"lora.r": [8, 16], "method": {"QLoRA": {}, "LoRA": {"quant": None}}},
            "rules": [
                {"when": {"model": "b"}, "set": {"train": {"steps": 7}}},
                {"when": {"model": "b", "seed": [0, 1]}, "set": {"train.weight_decay": 0.5}},
            ],
            "train": {"steps": 5},
        },
        "a test",
        {"lora.alpha": 4},
    )
    assert len(sweep.cells) == 2 * 2 * 3 * 2 * 2
    assert len({cell.name for cell in sweep.cells}) == len(sweep.cells)
    cell = next(c for c in sweep.cells if c.name == "mine--b--lora.r=16--LoRA--seed2")
    assert cell.run.model.source == "a/b"
    assert (cell.run.data.source, cell.run.data.target_max_len) == ("x.json", 9)
    assert cell.run.quant is None
    assert (cell.run.lora.r, cell.run.lora.alpha) == (16, 4)
    assert (cell.run.train.steps, cell.run.train.seed) == (7, 2)
    assert cell.variant == "lora.r=16, LoRA"
    # Of several conditions all have to hold.
    decayed = {
        (c.labels["model"], c.labels["seed"]) for c in sweep.cells if c.run.train.weight_decay
    }
    assert decayed == {("b", "0"), ("b", "1")}
    assert next(c for c in sweep.cells if c.labels["model"] == "stdlib-1m").run.train.steps == 5


def test_what_wins_where_several_say_something():
    length = "data.target_max_len"
    mine = {"source": "x.json", "target_max_len": 2, "columns": {"input": "question"}}
    tree = {
        "data": {"target_max_len": 1, "columns": {"output": "answer"}},
        "datasets": {"mine": mine, "theirs": {"source": "y.json"}},
    }
    rules = [{"when": {"dataset": "mine"}, "set": {length: n}} for n in (3, 4)]
    axes = {"length": {"six": {length: 6}, "any": {}}}

    def found(settings=None, **more):
        return [cell.run.data for cell in build_sweep({**tree, **more}, "a test", settings).cells]

    assert [data.columns for data in found()] == [
        {"output": "answer", "input": "question"}, {"output": "answer"}
    ]  # fmt: skip
    for data, expected in (
        (found(), [2, 1]),
        (found(rules=rules), [4, 1]),
        (found({length: 5}, rules=rules), [5, 5]),
        (found({length: 5}, rules=rules, axes=axes), [6, 5, 6, 5]),
    ):
        assert [one.target_max_len for one in data] == expected


def test_a_section_of_an_axis_leaves_the_rest_of_the_files_section():
    methods = {"wide": {"lora": {"r": 16}}, "FP4": {"quant": {"quant_type": "fp4"}}, "4": {}}
    tree = {"lora": {"alpha": 32}, "quant": {"blocksize": 128}, "axes": {"method": methods}}
    wide, fp4, plain = (cell.run for cell in build_sweep(tree, "a test", {"lora.r": 4}).cells)
    assert (wide.lora.r, wide.lora.alpha, plain.lora.r) == (16, 32, 4)
    assert (fp4.quant.quant_type, fp4.quant.blocksize) == ("fp4", 128)
    # Of 16 bits in the file, an empty section is the default's 4.
    tree |= {"quant": None, "axes": {"method": {"16": {}, "4": {"quant": {}}}}}
    assert [cell.run.quant for cell in build_sweep(tree, "a test").cells] == [None, QuantConfig()]


@pytest.mark.parametrize("given", [{"lora.rank_pattern": RANKS}, {"lora": {"rank_pattern": RANKS}}])
def test_a_pattern_with_points_in_it_is_one_value(given):
    rule = {"when": {"method": "b"}, "set": given}
    tree = {"axes": {"method": {"a": given, "b": {}, "c": {}}}, "rules": [rule]}
    found = [cell.run.lora.rank_pattern for cell in build_sweep(tree, "a test").cells]
    assert found == [RANKS, RANKS, {}]


@pytest.mark.parametrize("given", [{"lora.r": 4}, {"lora": {"r": 4}}, {"lora": None}])
def test_what_every_label_of_an_axis_sets_is_not_set_beside_it(given):
    tree = {"axes": {"method": {"a": {"lora": {"r": 8}}, "b": {"lora.r": 16}}}}
    with pytest.raises(ValueError, match="is set, but the axis method sets it in every cell"):
        build_sweep(tree, "a test", given)
    beside = build_sweep(tree, "a test", {"lora": {"alpha": 4}})
    assert [(cell.run.lora.r, cell.run.lora.alpha) for cell in beside.cells] == [(8, 4), (16, 4)]


def test_the_usual_names_are_of_options():
    run = build_run({}, "a test")
    for option in USUAL_NAMES:
        section, _, name = option.partition(".")
        assert hasattr(getattr(run, section), name)


def test_a_cells_t5_has_the_adapters_that_a_single_runs_has(tmp_path):
    t5 = str(tiny_t5(tmp_path / "t5"))
    sweep = build_sweep(
        {"models": [t5, "stdlib-1m"], "axes": {"m": {"a": {}, "b": {"lora.r": 4}}}}, "a test"
    )
    found = [(cell.run.lora.r, cell.run.lora.alpha) for cell in with_adapters(sweep).cells]
    assert found == [(16, 64), (4, 64), (64, 16), (4, 16)]
    single = read_run(make_parser().parse_args(["--model", t5]))
    assert (single.lora.r, single.lora.alpha) == found[0]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"modles": []}, "the nearest is models"),
        ({"models": []}, "should be a list of names"),
        ({"seeds": 3}, "should be a list such as"),
        ({"axes": {"lora.rr": [1]}}, "there is no option lora.rr"),
        ({"axes": {"lora.r": 4}}, "should be a list of values"),
        ({"rules": [{"when": {"modell": "x"}, "set": {}}]}, "the nearest is when.model"),
        ({"rules": [{"if": 1}]}, "should read"),
        ({"models": ["a/b", "c/b"]}, "two entries called b"),
    ],
)
def test_a_wrong_sweep_is_refused(tree, words):
    with pytest.raises(ValueError, match=words):
        build_sweep(tree, "a test")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_files_that_come_along_are_valid(file):
    tree = read_yaml(file)
    sweep = build_sweep(tree, file.name)
    if "models" in tree:
        assert len(sweep.cells) >= 8
    else:
        assert [cell.run for cell in sweep.cells] == [build_run(tree, file.name)]


def test_embedded_names_are_those_of_the_folders():
    assert all(dataset.folder.is_dir() for dataset in DATASETS.values())
    assert list(MODELS) == ["stdlib-1m", "stdlib-4m"]
