"""The paper's eight datasets: real rows in every schema that could be had."""

import json

import datasets
import pytest

from qlora_jax.data import IGNORE, INSTRUCT, load_instruct, load_tokenizer, tokenize_rows
from qlora_jax.data.instruct import best_path
from tests.shared import shared_path

FILES = [
    ("oasst1", "oasst_trees.jsonl", 60),
    ("oasst1", "oasst1_best_replies.jsonl", 590),
    ("hh-rlhf", "hh_rlhf.jsonl", 1200),
    ("alpaca", "alpaca.json", 3000),
    ("alpaca-clean", "alpaca_cleaned_first1000.json", 1000),
    ("self-instruct", "self_instruct_prompt_completion.jsonl", 175),
    ("self-instruct", "self_instruct_xturing_davinci.jsonl", 184),
    ("self-instruct", "self_instruct_seed_tasks.jsonl", 175),
    ("unnatural-instructions-core", "unnatural_instructions.jsonl", 700),
    ("unnatural-instructions", "unnatural_instructions.jsonl", 700),
    ("flan-v2", "flan_v2_cot.jsonl", 1000),
    ("flan-v2", "flan_v2_niv2.jsonl", 1000),
    ("flan-v2", "flan_v2_t0.jsonl", 1000),
    ("longform", "longform_train.json", 17),
]


@pytest.fixture(scope="module")
def stories():
    return load_tokenizer(shared_path("data/models/stories260K"))


@pytest.mark.parametrize(("name", "file", "count"), FILES)
def test_every_real_file_loads_and_tokenizes(name, file, count, stories, tmp_path):
    path = shared_path(f"data/instruct/{file}")
    rows, form, train_on = load_instruct(name, path, cache_dir=tmp_path)
    assert len(rows) == count
    some = [rows[i] for i in range(min(count, 50))]
    examples = tokenize_rows(some, form, stories, train_on=train_on)
    assert len(examples) == len(some)
    for row, example in zip(some, examples, strict=True):
        segments = form.segments(row, train_on)
        assert stories.decode(example.input_ids) == "".join(s.text for s in segments)
        assert "<|endoftext|>" not in "".join(s.text for s in segments)
        if train_on == "all":
            assert (example.labels[1:] != IGNORE).all()
        else:
            assert (example.labels == IGNORE).sum() > 5


def test_oasst_trees_follow_the_best_rank(tmp_path):
    def message(text, rank=None, replies=(), role="assistant", **more):
        return {"text": text, "rank": rank, "role": role, "replies": list(replies), **more}

    best = message("best", 0, [message("thanks", role="prompter")])
    replies = [message("unranked"), message("worse", 1), message("gone", -1, deleted=True), best]
    tree = {"prompt": message("hello", role="prompter", replies=replies)}
    assert list(best_path(tree)) == [
        {
            "messages": [
                {"role": "prompter", "content": "hello"},
                {"role": "assistant", "content": "best"},
            ]
        }
    ]
    assert list(best_path({"prompt": message("hello", role="prompter")})) == []

    path = shared_path("data/instruct/oasst_trees.jsonl")
    loaded = load_instruct("oasst1", path, cache_dir=tmp_path)
    trees = [json.loads(line) for line in path.read_text().split("\n") if line]
    for row, tree in zip(loaded.rows, trees, strict=True):
        first, second = row["messages"][:2]
        assert first["content"] == tree["prompt"]["text"]
        ranked = {reply["text"]: reply.get("rank") for reply in tree["prompt"]["replies"]}
        ranks = [rank for rank in ranked.values() if rank is not None]
        assert ranked[second["content"]] == (min(ranks) if ranks else None)
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["prompter", "assistant"] * (len(roles) // 2)
    text = "".join(segment.text for segment in loaded.form.segments(loaded.rows[0], "all"))
    assert text.startswith("### Human: How can I find the best 401k plan for my needs? ### Assist")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_chip2_by_its_schema(tmp_path):
    rows = [{"text": "<human>: Why?\nTell me.\n<bot>: So.\nThat is all."}]
    loaded = load_instruct("chip2", write(tmp_path / "a.jsonl", rows), cache_dir=tmp_path)
    assert loaded.rows == [{"input": "Why?\nTell me.", "output": "So.\nThat is all."}]
    bad = write(tmp_path / "b.jsonl", [*rows, {"text": "Why?"}])
    with pytest.raises(ValueError, match=r"row 1 of .*b.jsonl: a Chip2 row must .*begins 'Why\?'"):
        load_instruct("chip2", bad, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"row 0 of .* contradicts its schema \(AttributeError"):
        load_instruct("chip2", write(tmp_path / "c.jsonl", [{"text": 1}]), cache_dir=tmp_path)


def test_unnatural_instructions_in_their_original_schema(tmp_path):
    instance = {"instruction_with_input": "Add 1, 2", "input": "1, 2", "output": "3"}
    other = {**instance, "instruction_with_input": "Sum 1, 2"}
    rows = [{"instruction": "Add", "instances": [instance], "reformulations": [other]}]
    path = write(tmp_path / "a.jsonl", rows)
    loaded = load_instruct("unnatural-instructions", path, cache_dir=tmp_path)
    assert loaded.rows == [
        {"input": "Add 1, 2", "output": "3"},
        {"input": "Sum 1, 2", "output": "3"},
    ]


def test_flan_v2_in_the_schema_of_the_hub(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"inputs": "Why?", "targets": "So.", "task": "t"}])
    rows, form, _ = load_instruct("flan-v2", path, cache_dir=tmp_path)
    assert "".join(segment.text for segment in form.segments(rows[0])) == "Why? So."


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (
            {"instruction": "Add.", "input": "1 2", "output": ["3", "three"]},
            {"input": "Add.\n1 2", "output": "3"},
        ),
        (
            {"instruction": "Say it.", "input": "", "output": "So."},
            {"input": "Say it.", "output": "So."},
        ),
        (
            {"question": "1 + 2?", "answer": "3", "rationale": "One more than 2."},
            {"input": "1 + 2?", "output": "One more than 2. So the answer is 3."},
        ),
    ],
    ids=["several answers", "no input", "chain of thought"],
)
def test_flan_v2_as_others_flattened_it(row, example, tmp_path):
    loaded = load_instruct("flan-v2", write(tmp_path / "a.jsonl", [row]), cache_dir=tmp_path)
    assert loaded.rows == [example]


def test_the_hub_is_asked_for_what_the_table_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def answer(hub_name, **options):
        asked.append((hub_name, options["name"], options["data_files"], options["split"]))
        return datasets.Dataset.from_list([{"text": "<human>: a\n<bot>: b"}])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_instruct("chip2", split="train[:1]").rows == [{"input": "a", "output": "b"}]
    assert asked == [("laion/OIG", None, "unified_chip2.jsonl", "train[:1]")]
    # The whole of it must be the whole of it.
    with pytest.raises(ValueError, match="laion/OIG gave 1 examples, but 210289 were released"):
        load_instruct("chip2")
    with pytest.raises(ValueError, match="but 210289 were released"):
        load_instruct("chip2", split="train")
    assert len(load_instruct("chip2", check_count=False).rows) == 1
    assert len(load_instruct("chip2", data_files="part.jsonl").rows) == 1
    assert asked[-1] == ("laion/OIG", None, "part.jsonl", None)


def test_other_columns_are_refused_with_whose_they_are(tmp_path):
    path = shared_path("data/instruct/hh_rlhf.jsonl")
    with pytest.raises(
        ValueError,
        match=r"columns chosen, rejected, but 'longform' has \(input, output\); "
        r"the loader of hh-rlhf would take them\.$",
    ):
        load_instruct("longform", path, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="no loader and no format takes these: rename them"):
        load_instruct("alpaca", write(tmp_path / "a.jsonl", [{"a": "b"}]), cache_dir=tmp_path)
    turns = write(tmp_path / "turns.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match="the format messages or messages-chatml would take them"):
        load_instruct("alpaca", turns, cache_dir=tmp_path)
    with pytest.raises(
        ValueError, match="there is no dataset 'guanaco'; the paper's are oasst1, hh"
    ):
        load_instruct("guanaco")


def test_the_table_is_the_papers():
    counts = {name: d.paper_rows for name, d in INSTRUCT.items() if d.paper_rows is not None}
    assert counts == {
        "oasst1": 9_209,
        "hh-rlhf": 160_800,
        "alpaca": 51_942,
        "self-instruct": 82_612,
        "unnatural-instructions": 240_670,
        "chip2": 210_289,
        "longform": 23_700,
    }
    # What the hub's cards say of their training splits, and of the examples in their rows.
    released = {name: d.released for name, d in INSTRUCT.items()}
    assert released == counts | {
        "oasst1": 9_846,
        "alpaca": 52_002,
        "alpaca-clean": 51_760,
        "unnatural-instructions-core": 68_478,
        "flan-v2": None,
        "longform": 23_652,
    }
    # Loss on whole conversations where the paper read conversations, on responses elsewhere.
    assert {name for name, d in INSTRUCT.items() if d.train_on == "all"} == {"oasst1", "hh-rlhf"}
