"""One reader for files, folders and the hub; no test reaches the network or the home folder."""

import bz2
import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora_jax.data import load_rows
from tests.shared import shared_path

ROWS = [{"instruction": f"Count {i}, “slowly”", "output": f'a,b\n"{i}"'} for i in range(20)]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(path, rows=ROWS):
    suffix = path.name.removeprefix("rows").removesuffix(".gz").removesuffix(".bz2")
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        return
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if suffix == ".json":
            json.dump(rows, file)
        elif suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(
                file, rows[0], delimiter="\t" if suffix.lower() == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize(
    "ending",
    [
        *(".json", ".jsonl", ".csv", ".tsv", ".TSV", ".parquet"),
        *(".json.gz", ".jsonl.gz", ".csv.gz", ".jsonl.bz2"),
    ],
)
def test_every_format_gives_the_same_rows(ending, tmp_path, cache):
    path = tmp_path / f"rows{ending}"
    write(path)
    rows = load_rows(path, cache_dir=cache)
    assert rows.column_names == ["instruction", "output"]
    assert list(rows) == ROWS
    assert rows[3] == ROWS[3]
    assert list(load_rows(str(path), "train[5:8]", cache_dir=cache)) == ROWS[5:8]
    assert len(load_rows(path, "train[:50%]", cache_dir=cache)) == 10


def test_cells_of_a_csv_file_are_the_text_that_stands_there(tmp_path, cache):
    (tmp_path / "rows.csv").write_text('input,output\n1.50,007\n,NA\nnull,"a,b"\n')
    assert list(load_rows(tmp_path / "rows.csv", cache_dir=cache)) == [
        {"input": "1.50", "output": "007"},
        {"input": "", "output": "NA"},
        {"input": "null", "output": "a,b"},
    ]


def test_so_are_those_of_a_folder_of_csv_files(tmp_path, cache):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.csv").write_text("input,output\n1.50,007\n,NA\n")
    (folder / "test.csv").write_text("output,input\n01,x\n")
    (folder / "notes.txt").write_text("how they were made")
    expected = [{"input": "1.50", "output": "007"}, {"input": "", "output": "NA"}]
    assert list(load_rows(folder, cache_dir=cache)) == expected
    held_out = [{"input": "x", "output": "01"}]
    assert list(load_rows(folder, "test", cache_dir=cache)) == held_out
    assert list(load_rows(folder, data_files="test.csv", cache_dir=cache)) == held_out


@pytest.mark.parametrize(("types", "cell"), [("", "07"), ("int64", 7)])
def test_a_readme_says_how_a_folder_is_read(types, cell, tmp_path, cache):
    folder = tmp_path / "rows"
    folder.mkdir()
    how = "configs:\n- config_name: default\n  data_files: rows.csv\n  sep: ;\n"
    if types:
        columns = "".join(f"  - {{name: {name}, dtype: {types}}}\n" for name in "ab")
        how += f"dataset_info:\n  features:\n{columns}"
    (folder / "README.md").write_text(f"---\n{how}---\n")
    (folder / "rows.csv").write_text("a;b\n5;07\n")
    assert load_rows(folder, cache_dir=cache)[0]["b"] == cell


def test_a_folder_with_a_file_that_pyarrow_dies_of(tmp_path, cache):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"a": 1}\n')
    (folder / "b.json").write_text("null")
    with pytest.raises(ValueError, match=r"rows cannot be read as a dataset: b.json begins with"):
        load_rows(folder, cache_dir=cache)


def test_text_files_are_one_row_a_line(tmp_path, cache, monkeypatch):
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (tmp_path / "rows.txt", "~/rows.txt"):
        assert list(load_rows(source, cache_dir=cache)) == [{"text": "one"}, {"text": "two"}]


def test_a_changed_file_is_read_again(tmp_path, cache):
    path = tmp_path / "rows.json"
    write(path)
    assert len(load_rows(path, cache_dir=cache)) == 20
    write(path, ROWS[:7])
    assert len(load_rows(path, cache_dir=cache)) == 7


def test_a_folder_has_the_splits_its_files_are_named_for(tmp_path, cache):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, count in (("train", 20), ("test", 5)):
        write(folder / "rows.jsonl", ROWS[:count])
        (folder / "rows.jsonl").rename(folder / f"{name}.jsonl")
    assert len(load_rows(folder, cache_dir=cache)) == 20
    assert len(load_rows(folder, "test", cache_dir=cache)) == 5
    with pytest.raises(ValueError, match=r"split 'dev'.*Unknown split"):
        load_rows(folder, "dev", cache_dir=cache)


@pytest.mark.parametrize(
    ("name", "count", "columns"),
    [
        ("alpaca.json", 3000, ["instruction", "input", "output"]),
        ("hh_rlhf.jsonl", 1200, ["chosen", "rejected"]),
        ("longform_train.json", 17, ["input", "output", "source", "subset"]),
        ("oasst_trees.jsonl", 60, ["message_tree_id", "tree_state", "prompt"]),
        ("self_instruct_prompt_completion.jsonl", 175, ["prompt", "completion"]),
    ],
)
def test_real_files(name, count, columns, cache):
    rows = load_rows(shared_path(f"data/instruct/{name}"), cache_dir=cache)
    assert len(rows) == count
    assert rows.column_names == columns


def test_a_real_parquet_file(cache):
    rows = load_rows(shared_path("data/text/wikitext-2-raw-v1_test.parquet"), cache_dir=cache)
    assert len(rows) == 4358
    assert rows[1] == {"text": " = Robert Boulter = \n"}


def test_the_bars_of_datasets_are_left_as_they_were(tmp_path, cache, capsys):
    write(tmp_path / "rows.json")
    verbosity = datasets.logging.get_verbosity()
    assert not datasets.are_progress_bars_disabled()
    load_rows(tmp_path / "rows.json", cache_dir=cache)
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == verbosity
    assert "Generating" not in capsys.readouterr().err


class Hub:
    """Stands where `datasets` would go to the network: records what it is asked, then answers."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, *args, **options):
        self.asked.append((args, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def hub(monkeypatch):
    def install(answer) -> Hub:
        hub = Hub(answer)
        monkeypatch.setattr(datasets, "load_dataset", hub)
        return hub

    return install


def test_hub_names_go_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = datasets.Dataset.from_list(ROWS)
    asked = hub(datasets.DatasetDict(train=stored, test=stored.select(range(3)))).asked
    assert len(load_rows("tatsu-lab/alpaca", revision="main", name="a")) == 20
    assert asked[0][0] == ("tatsu-lab/alpaca",)
    assert asked[0][1] == {
        **{"split": None, "cache_dir": None, "name": "a", "data_files": None},
        "revision": "main",
    }
    assert all("trust_remote_code" not in options for _, options in asked)
    hub(datasets.DatasetDict(evaluation=stored))
    assert len(load_rows("tatsu-lab/alpaca")) == 20
    hub(datasets.DatasetDict(one=stored, two=stored))
    with pytest.raises(ValueError, match=r"has the splits one, two: say which \(split="):
        load_rows("tatsu-lab/alpaca")


def test_a_local_folder_is_never_a_hub_name_by_accident(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub_calls = hub(datasets.Dataset.from_list(ROWS)).asked
    (tmp_path / "sets").mkdir()
    with pytest.raises(FileNotFoundError, match="write hub:sets/alpaca"):
        load_rows("sets/alpaca")
    for missing in ("alpaca.json", "sets/alpaca.jsonl", "/nowhere/a", "./a", "a/b/c", "alpaca"):
        with pytest.raises(FileNotFoundError, match="does not exist: expected a file"):
            load_rows(missing)
    assert not hub_calls
    assert len(load_rows("hub:sets/alpaca")) == 20
    assert hub_calls[0][0] == ("sets/alpaca",)
    with pytest.raises(ValueError, match="is no hub name: expected hub:owner/name"):
        load_rows("hub:alpaca")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ConnectionError("no route"), ConnectionError, "not in the cache and the hub cannot be"),
        (
            datasets.exceptions.DatasetNotFoundError("gone"),
            FileNotFoundError,
            "the hub has no dataset 'owner/name' that you may read",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), ValueError, "scripts are no"),
        (ValueError("Unknown split"), ValueError, "'owner/name' cannot be read: Unknown split"),
    ],
)
def test_the_hub_failing_is_one_sentence(hub, tmp_path, monkeypatch, raised, kind, message):
    monkeypatch.chdir(tmp_path)
    hub(raised)
    with pytest.raises(kind, match=message) as caught:
        load_rows("owner/name")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_says_so(tmp_path, monkeypatch):
    # The library's own way of being offline, so that the real code path answers.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match="'owner/name' is not in the cache and the hub cannot"
    ):
        load_rows("owner/name", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", r"\(split train\) is empty: there is not one row"),
        ("a.json", "[]", r"a.json \(split train\) is empty: there is not one row"),
        ("a.csv", "a,b\n", r"a.csv \(split train\) is empty: there is not one row"),
        ("a.json", "null", "a.json cannot be read as a dataset: a.json begins with null, but rows"),
        ("a.jsonl", "\ufeffnull\n{}", "begins with null"),
        ("a.jsonl.gz", gzip.compress(b"null", mtime=0), "begins with null"),
        ("a.json", '{"a": 1,', "a.json cannot be read as a dataset: JSON parse error"),
        ("a.jsonl", '{"a": 1}\n{"a"', r"a.jsonl cannot be read as a dataset"),
        ("a.parquet", "PAR0", r"a.parquet cannot be read as a dataset"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv cannot be read as a dataset"),
        ("b.csv", "a,b\n1,2,3\n4,5,6\n", r"b.csv cannot be read.*more cells than the first"),
        ("c.tsv", "a\tb\n1\t2\t3\n4\t5\n", r"c.tsv cannot be read.*more cells than the first"),
        ("a.jsonl.gz", "not gzip", r"a.jsonl.gz cannot be read as a dataset"),
        ("a.csv.bz2", "not bz2", r"a.csv.bz2 cannot be read as a dataset: Invalid data stream"),
        ("a.jsonl.xz", "not xz", r"a.jsonl.xz cannot be read as a dataset: Input format"),
        (
            "a.csv.gz",
            gzip.compress(b"a", mtime=0)[:10] + b"\xff" * 20,
            "a.csv.gz cannot be read as a data",
        ),
        ("a.xlsx", "a", r"no ending that tells its format: expected \.json"),
        ("a", "a", "no ending that tells its format"),
    ],
)
def test_unreadable_files_are_refused(name, content, message, tmp_path, cache):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(tmp_path / name, cache_dir=cache)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("as_users_run_it")
def test_rows_at_hand_are_no_source():
    with pytest.raises(TypeError, match=r"^source is a list, but a file, .* go to tokenize_rows"):
        load_rows(ROWS)


def test_options_of_the_hub_do_not_belong_to_files(tmp_path):
    write(tmp_path / "rows.json")
    with pytest.raises(ValueError, match="revision belongs to a hub dataset"):
        load_rows(tmp_path / "rows.json", revision="main")
    with pytest.raises(ValueError, match="is a file, which has no configuration 'a'"):
        load_rows(tmp_path / "rows.json", name="a")


def test_what_a_dataset_saved_of_itself_is_read(tmp_path, cache):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=rows, test=rows.select([4])).save_to_disk(tmp_path / "two")
    assert list(load_rows(tmp_path / "one", cache_dir=cache)) == ROWS
    assert list(load_rows(tmp_path / "one", "train[5:8]", cache_dir=cache)) == ROWS[5:8]
    assert list(load_rows(tmp_path / "two", cache_dir=cache)) == ROWS
    assert list(load_rows(tmp_path / "two", "test", cache_dir=cache)) == [ROWS[4]]
    shard = next((tmp_path / "one").glob("*.arrow"))
    assert load_rows(shard, cache_dir=cache)[0] in ROWS


@pytest.mark.parametrize(
    "listed", ['["a"]', '[{"filename": "../rows.arrow"}]', '[{"filename": "/rows.arrow"}]', "7"]
)
def test_a_saved_dataset_reaches_no_other_folder(tmp_path, listed):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text(f'{{"_data_files": {listed}}}')
    with pytest.raises(ValueError, match=r"state.json lists .*, but the name of one in the folder"):
        load_rows(tmp_path / "one")


def test_a_folder_of_several_configurations_is_read_by_name(tmp_path, cache):
    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", rows)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: a\n  data_files: a/*\n- config_name: b\n  data_files: b/*\n---\n"
    )
    assert list(load_rows(tmp_path, name="b", cache_dir=cache)) == ROWS[3:]
    with pytest.raises(ValueError, match=r"pick one among the available configs: \['a', 'b'\]"):
        load_rows(tmp_path, cache_dir=cache)


def test_columns_go_by_the_names_that_formats_know(tmp_path, cache):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "1 + 2", "input": "?", "output": "3"}))
    for columns, expected in (
        ({"input": "question"}, {"input": "1 + 2", "output": "3"}),
        (
            {"input": "output", "output": "input"},
            {"question": "1 + 2", "input": "3", "output": "?"},
        ),
        ({"input": "input"}, {"question": "1 + 2", "input": "?", "output": "3"}),
        ({}, {"question": "1 + 2", "input": "?", "output": "3"}),
    ):
        assert load_rows(file, columns=columns, cache_dir=cache)[0] == expected
    with pytest.raises(ValueError, match="no column 'answer', but question, input, output"):
        load_rows(file, columns={"output": "answer"}, cache_dir=cache)
    with pytest.raises(ValueError, match=r"column 'question' of .* cannot have two names"):
        load_rows(file, columns={"input": "question", "text": "question"}, cache_dir=cache)


def test_an_empty_folder_is_refused(tmp_path, cache):
    with pytest.raises(ValueError, match="cannot be read as a dataset"):
        load_rows(tmp_path, cache_dir=cache)
