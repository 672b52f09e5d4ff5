"""MMLU: prompts against the files of others, answers against scores set by hand."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from datasets import Dataset
from flax import nnx

from qlora_jax.data import load_tokenizer
from qlora_jax.evaluate import (
    GROUPS,
    SUBJECTS,
    Question,
    answer_tokens,
    examine,
    load_questions,
    mmlu,
    mmlu_questions,
    prompt_of,
)
from tests.shared import shared_path


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(shared_path("data/tokenizers/llama2"))


def questions(split: str):
    return load_questions(shared_path("data/mmlu"), split)


def test_prompts_equal_qloras_own_files():
    dev, val = questions("dev"), questions("val")
    zero = shared_path("data/mmlu/zero_shot_mmlu_val.json").read_text("utf-8").split("\n")
    five = gzip.decompress(shared_path("data/mmlu/five_shot_mmlu_val.jsonl.gz").read_bytes())
    for lines, shots in ((zero, 0), (five.decode().split("\n"), 5)):
        expected = [json.loads(line) for line in lines if line]
        ours = [
            {"subject": s, "input": prompt_of(q, dev[s][:shots]), "output": q.answer}
            for s in sorted(val)
            for q in val[s]
        ]
        assert ours == expected


def test_the_table_of_subjects():
    assert {group: len(subjects) for group, subjects in GROUPS.items()} == {
        "STEM": 18, "humanities": 13, "social sciences": 12, "other": 14,
    }  # fmt: skip
    assert len(SUBJECTS) == 57
    assert set(questions("dev")) == set(SUBJECTS)
    assert sum(map(len, questions("dev").values())) == 285
    assert {len(rows) for rows in questions("test10").values()} == {10}
    limited = load_questions(shared_path("data/mmlu"), "val", limit=2)
    assert sum(map(len, limited.values())) == 2 * 57


class Parrot(nnx.Module):
    """Knows one thing: which letter follows a last token. Scores are a table, by token."""

    def __init__(self, table: jax.Array):
        self.table = nnx.Param(table)

    def hidden(self, input_ids, positions):
        return self.table[...][input_ids]

    def head(self, hidden):
        return hidden


def parrot(tokenizer, answers: dict[str, str]) -> Parrot:
    """A model whose letter depends on the last token of the prompt."""
    vocab = tokenizer.vocab_size
    letters = answer_tokens(tokenizer)
    table = jnp.zeros((vocab, vocab), jnp.float32)
    for last, letter in answers.items():
        row = tokenizer.encode(last, continues=True)[-1]
        table = table.at[row, letters["ABCD".index(letter)]].set(5.0)
    return Parrot(table)


def ask(subject: str, answer: str, text: str = "Which?") -> Question:
    return Question(subject, text, ("one", "two", "three", "four"), answer)


@pytest.fixture(scope="module")
def stories():
    """512 tokens, in which the letters have no token with a space before."""
    return load_tokenizer(shared_path("data/models/stories260K"))


def test_a_model_of_known_scores_by_hand(stories, tmp_path):
    asked = {
        "virology": [ask("virology", "C"), ask("virology", "B"), ask("virology", "C")],
        "astronomy": [ask("astronomy", "C")] * 5,
        "sociology": [ask("sociology", "A"), ask("sociology", "B")],
    }
    # Every prompt ends in ":", so every answer is C.
    model = parrot(stories, {":": "C"})
    result = examine(model, stories, asked, {}, shots=0, max_len=512, batch_size=4)
    assert dict(result.asked) == {"astronomy": 5, "virology": 3, "sociology": 2}
    assert dict(result.correct) == {"astronomy": 5, "virology": 2, "sociology": 0}
    assert result.micro == 7 / 10
    assert result.macro == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert result.groups == {"STEM": 1.0, "social sciences": 0.0, "other": pytest.approx(2 / 3)}
    assert (result.shortened, result.cut) == (0, 0)
    assert json.loads(json.dumps(result.as_dict()))["questions"] == 10
    # Where all four score alike the first is taken.
    tied = examine(parrot(stories, {}), stories, asked, {}, shots=0, max_len=512)
    assert dict(tied.correct) == {"astronomy": 0, "virology": 0, "sociology": 1}


def test_an_examination_goes_on_where_it_was_broken_off(stories, tmp_path, monkeypatch):
    asked = {"virology": [ask("virology", "C", "Which? " + "And? " * i) for i in range(9)]}
    model, file = parrot(stories, {":": "C"}), tmp_path / "answers.jsonl"
    options = {"shots": 0, "max_len": 512, "batch_size": 2, "answers": file}

    def stop(done, of):
        assert of == 9
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(model, stories, asked, {}, progress=stop, **options)
    with file.open("a") as unfinished:
        unfinished.write('{"question": "virol')
    seen = []
    result = examine(model, stories, asked, {}, progress=lambda *n: seen.append(n), **options)
    assert seen == [(6, 9), (8, 9), (9, 9)]
    assert result == examine(model, stories, asked, {}, shots=0, max_len=512)
    assert len(file.read_text().splitlines()) == 1 + 9
    with pytest.raises(ValueError, match="the answers of another examination"):
        examine(model, stories, asked, {}, identity={"adapter": "b"}, **options)
    others = {"virology": [question._replace(text="What?") for question in asked["virology"]]}
    with pytest.raises(ValueError, match="the answers of another examination"):
        examine(model, stories, others, {}, **options)
    # Killed before its first line was whole: nothing is lost.
    whole = file.read_text()
    for begun in (0, 9):
        file.write_text(whole[:begun])
        assert examine(model, stories, asked, {}, **options) == result
        assert file.read_text() == whole
    for odd in (b"[]", b"{}", b"notes", b"\xff"):
        file.write_bytes(whole.encode() + odd + b"\n")
        with pytest.raises(ValueError, match=r"answers\.jsonl, line 11 holds no answer"):
            examine(model, stories, asked, {}, **options)
    file.write_text("notes of mine")
    with pytest.raises(ValueError, match="the answers of another examination"):
        examine(model, stories, asked, {}, **options)


def test_shots_are_left_out_until_a_prompt_fits(llama):
    dev, val = questions("dev"), questions("val")
    question = val["college_biology"][0]
    lengths = [len(llama.encode(prompt_of(question, dev["college_biology"][:k]))) for k in range(6)]
    for count in range(6):
        for room in (0, 1):
            limit = lengths[count] + room
            prompt = mmlu._fitted("k", question, dev["college_biology"], llama, limit)
            assert (prompt.shots, prompt.cut) == (count, False)
            assert prompt.ids == llama.encode(prompt_of(question, dev["college_biology"][:count]))
    # Not even alone: the end is kept, and bos.
    cut = mmlu._fitted("k", question, dev["college_biology"], llama, lengths[0] - 1)
    assert (cut.shots, cut.cut, len(cut.ids)) == (0, True, lengths[0] - 1)
    assert cut.ids[0] == llama.bos_token_id
    assert llama.decode(cut.ids).endswith("Answer:")


def test_shortened_and_cut_questions_are_counted(stories):
    short, long = ask("virology", "C"), ask("virology", "C", "Which? " * 30)
    alone, shown = (len(stories.encode(prompt_of(short, [short] * n))) for n in (0, 1))
    model = parrot(stories, {":": "C"})
    # One fits without a solved question, neither does.
    for max_len, counts in ((shown - 1, (2, 1)), (alone - 1, (2, 2))):
        asked, dev = {"virology": [short, long]}, {"virology": [short]}
        result = examine(model, stories, asked, dev, shots=1, max_len=max_len)
        assert (result.shortened, result.cut, result.micro) == (*counts, 1.0)


def test_few_programs_for_all_lengths():
    buckets = {mmlu.bucket_of(n, 2048) for n in range(1, 2049)}
    assert buckets == {64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048}
    assert all(n <= mmlu.bucket_of(n, 2048) < 2 * max(n, 64) for n in range(1, 2049))
    assert all(mmlu.bucket_of(n, 2048) == n for n in buckets)
    assert mmlu.bucket_of(900, 1000) == 1000


def test_compiles_once_per_bucket_and_not_again(stories):
    traced = []

    class Counted(Parrot):
        def hidden(self, input_ids, positions):
            traced.append(input_ids.shape)
            return super().hidden(input_ids, positions)

    asked = {"virology": [ask("virology", "C", "Why? " * (i % 40)) for i in range(120)]}
    table = parrot(stories, {}).table[...]
    for _ in range(2):  # as a probe of a training run does
        model = Counted(table + len(traced))
        examine(model, stories, asked, {}, shots=0, max_len=512, batch_size=4)
        assert 2 <= len(traced) == len(set(traced)) <= 5


def test_letters_are_tokens(llama, stories):
    assert [llama.decode([t]).strip() for t in answer_tokens(llama)] == list("ABCD")
    # What QLoRA's code looks at: the first token of "A", which a Llama tokenizer begins with "▁".
    assert answer_tokens(llama) == tuple(llama.encode(x, bos=False)[0] for x in "ABCD")
    assert len(set(answer_tokens(stories))) == 4


def test_the_hubs_copy(tmp_path, monkeypatch):
    def rows(*given):
        held = [{"subject": "virology", "question": "Which?"} | row for row in given]
        monkeypatch.setattr(mmlu_questions, "load_rows", lambda *_, **__: Dataset.from_list(held))
        return load_questions("cais/mmlu", "test")["virology"]

    abcd = ["a", "b", "c", "d"]
    assert [q.answer for q in rows(*({"choices": abcd, "answer": i} for i in range(4)))] == [
        *"ABCD"
    ]
    assert rows({"choices": abcd, "answer": "D"})[0].answer == "D"
    told = []

    def held(*given, **options):
        told.append((given, options))
        return Dataset.from_list([{"subject": "virology", "question": "Which?"} | row])

    row = {"choices": abcd, "answer": 0}
    monkeypatch.setattr(mmlu_questions, "load_rows", held)
    for split in ("dev", "val", "test"):
        load_questions("cais/mmlu", split)
    there = ("dev", "validation", "test")
    assert told == [(("cais/mmlu", split), {"name": "all"}) for split in there]
    for odd in (
        {"choices": abcd, "answer": -1},
        {"choices": abcd, "answer": 4},
        {"choices": abcd, "answer": "E"},
        {"choices": abcd, "answer": None},
        {"choices": abcd[:3], "answer": 0},
        {"choices": None, "answer": 0},
    ):
        with pytest.raises(ValueError, match=r"cais/mmlu, row 0: expected four choices"):
            rows(odd)


def test_bad_input(stories, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the original's CSV files"):
        load_questions(tmp_path, "dev")
    (tmp_path / "dev").mkdir()
    file = tmp_path / "dev" / "virology_dev.csv"
    file.write_text("Which?,a,b,c,d,A\nWhich?,a,b,c,D\n")
    with pytest.raises(ValueError, match=r"row 2: expected a question.* 5 columns and ends in 'D'"):
        load_questions(tmp_path, "dev")
    file.rename(tmp_path / "dev" / "alchemy_dev.csv").write_text("Which?,a,b,c,d,A\n")
    with pytest.raises(ValueError, match="the subject 'alchemy', which is none of MMLU's 57"):
        load_questions(tmp_path, "dev")
    with pytest.raises(ValueError, match="is a file: give the folder with the original's dev/"):
        load_questions(tmp_path / "dev" / "alchemy_dev.csv", "dev")
    (tmp_path / "dev" / "alchemy_dev.csv").unlink()
    for content, message in (
        (b"Which\xe9?,a,b,c,d,A\n", r"virology_dev\.csv cannot be read as CSV in UTF-8"),
        (b"Which? " * 20000 + b",a,b,c,d,A\n", r"virology_dev\.csv cannot be read as CSV"),
        (b"", r"virology_dev\.csv is empty"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_questions(tmp_path, "dev")
    file.write_bytes(b"\xef\xbb\xbfWhich?,a,b,c,d,A\n")
    assert load_questions(tmp_path, "dev")["virology"][0].text == "Which?"
    asked = {"virology": [ask("virology", "A")]}
    with pytest.raises(ValueError, match="virology has 0 solved questions to show, but shots=5"):
        examine(parrot(stories, {}), stories, asked, {}, max_len=512)
    with pytest.raises(ValueError, match="no questions to ask"):
        examine(parrot(stories, {}), stories, {}, {}, max_len=512)
