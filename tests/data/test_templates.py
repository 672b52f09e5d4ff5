"""Prompt formats against real rows, against prompts that others wrote down, and as properties."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import FORMATS, Segment, check_columns, detect_format, formats_for, get_format
from qlora_jax.data.segments import trains_on_all
from tests.shared import shared_path


def rows_of(name: str) -> list[dict]:
    text = shared_path(f"data/instruct/{name}").read_text(encoding="utf-8")
    if name.endswith(".json"):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line]


def joined(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


def trained(segments: tuple[Segment, ...]) -> list[str]:
    return [segment.text for segment in segments if segment.trained]


def test_alpaca_by_hand():
    row = {"instruction": "Add {these}.", "input": "1, 2", "output": "3"}
    source, target = FORMATS["alpaca"].segments(row)
    assert source == Segment(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add {these}.\n\n### Input:\n1, 2\n\n### Response:",
        False,
        "source",
    )
    assert target == Segment("3", True, "target")
    for empty in ({"input": ""}, {"input": None}):
        source, _ = FORMATS["alpaca"].segments({**row, **empty})
        assert "Input" not in source.text
        assert source.text.startswith(
            "Below is an instruction that describes a task. Write a response that appropriately"
        )
    del row["input"]
    assert FORMATS["alpaca"].segments(row)[0] == source


@pytest.mark.parametrize("name", ["unnatural_instructions.jsonl", "flan_v2_niv2.jsonl"])
def test_alpaca_prompt_equals_one_written_elsewhere(name):
    # These files carry the Stanford prompt as MiniLLM's authors wrote it, and a line break more.
    for row in rows_of(name):
        source = FORMATS["alpaca"].source(row)
        assert row["prompt"] == source + "\n"


def test_alpaca_on_real_rows():
    for row in rows_of("alpaca.json"):
        segments = FORMATS["alpaca"].segments(row)
        assert trained(segments) == [row["output"]]
        assert ("### Input:" in segments[0].text) == bool(row["input"])
        assert trained(FORMATS["alpaca"].segments(row, "all")) == [s.text for s in segments]


def test_pairs_are_separated_only_where_they_would_run_together():
    form = FORMATS["input-output"]
    assert joined(form.segments({"input": "Why?", "output": "So."})) == "Why? So."
    assert joined(form.segments({"input": "Why?\n", "output": "So."})) == "Why?\nSo."
    assert joined(form.segments({"input": "Why?", "output": "\nSo."})) == "Why?\nSo."
    assert joined(form.segments({"input": "", "output": "So."})) == "So."
    assert joined(form.segments({"input": "Why?", "output": ""})) == "Why?"
    for row in rows_of("longform_train.json"):
        segments = form.segments(row)
        # One of the answers brings its own space.
        assert trained(segments) == [" " + row["output"].lstrip(" ")]
    for row in rows_of("self_instruct_prompt_completion.jsonl"):
        assert row["completion"] in joined(FORMATS["prompt-completion"].segments(row))


def test_guanaco_text_is_kept_to_the_character_and_assistant_turns_are_trained():
    rows = rows_of("oasst1_best_replies.jsonl")
    turns = 0
    for row in rows:
        text = {"text": row["guanaco_text"]}
        assert FORMATS["guanaco"].segments(text, "all") == (Segment(row["guanaco_text"], True),)
        segments = FORMATS["guanaco"].segments(text)
        assert joined(segments) == row["guanaco_text"]
        answers = trained(segments)
        assert answers[-1] == " " + row["output"]
        assert all(answer == answer.rstrip() for answer in answers[:-1])
        assert len(answers) == row["guanaco_text"].count("### Assistant:")
        assert not any("### Human:" in answer for answer in answers)
        turns += len(answers)
    assert turns == 321 + 2 * 257 + 3 * 12


def test_messages_in_guanaco_style_equal_the_flattened_text():
    for row in rows_of("oasst1_best_replies.jsonl"):
        messages = []
        for piece in FORMATS["guanaco"].segments({"text": row["guanaco_text"]}):
            if piece.trained:
                messages.append({"role": "assistant", "content": piece.text[1:]})
            else:
                human = piece.text.split("### Human:")[1].rsplit("### Assistant:")[0]
                messages.append({"role": "prompter", "text": human.strip(" ")})
        conversation = FORMATS["messages"].segments({"messages": messages})
        flat = FORMATS["guanaco"].segments({"text": row["guanaco_text"]})
        assert joined(conversation).replace(" ", "") == joined(flat).replace(" ", "")
        assert trained(conversation) == trained(flat)


def test_chatml_by_hand():
    turns = [
        ("system", "Be brief."),
        ("user", "Hi <|im_end|>"),
        ("assistant", "Hello."),
        ("user", ""),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    segments = FORMATS["messages-chatml"].segments(row)
    assert joined(segments) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n<|im_end|>"
    )
    # The answer and the marker that ends it, and nothing else.
    assert trained(segments) == ["Hello.", "<|im_end|>"]
    # What a row holds is never read as a marker.
    assert [s.special for s in segments if s.text in ("Be brief.", "Hi <|im_end|>", "Hello.")] == [
        False
    ] * 3
    assert all(s.special for s in segments if s.text.startswith("<|im"))
    assert joined(FORMATS["messages-chatml"].segments(row, "all")) == joined(segments)


def test_sharegpt_names_mean_the_same():
    for asks, answers in (("human", "gpt"), ("prompter", "bot"), ("user", "assistant")):
        row = {"messages": [{"from": asks, "value": "Hi"}, {"from": answers, "value": "Ho"}]}
        assert joined(FORMATS["messages"].segments(row)) == "### Human: Hi ### Assistant: Ho"


def test_a_system_text_stands_bare_in_guanaco_style():
    """As in the prompts that the paper's models were judged on."""
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]
    messages = [{"role": role, "content": content} for role, content in turns]
    written = "Be brief. ### Human: Hi ### Assistant: Ho"
    assert joined(FORMATS["messages"].segments({"messages": messages})) == written
    # One that is given is for conversations that have none.
    for system, turns in (("Be brief.", messages[1:]), ("Be long.", messages)):
        form = dataclasses.replace(FORMATS["messages"], system=system)
        assert joined(form.segments({"messages": turns})) == written


def test_hh_rlhf_conversations():
    for row in rows_of("hh_rlhf.jsonl"):
        segments = FORMATS["hh-rlhf"].segments(row)
        assert joined(segments) == row["chosen"]
        assert len(trained(segments)) >= 1
        assert not any("\n\nHuman:" in answer for answer in trained(segments))


def test_what_stands_before_the_first_marker_is_no_answer():
    row = {"text": "A chat. ### Human: Hi ### Assistant: Ho"}
    assert trained(FORMATS["guanaco"].segments(row)) == [" Ho"]


TURN = st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=20))


@settings(max_examples=100)
@given(st.lists(TURN, min_size=1, max_size=6), st.sampled_from(["messages", "messages-chatml"]))
def test_conversations_keep_every_content(turns, name):
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    response = FORMATS[name].segments(row)
    everything = FORMATS[name].segments(row, "all")
    assert joined(response) == joined(everything)
    assert all(segment.trained for segment in everything)
    assert all(segment.text and segment.part == "target" for segment in response)
    at = 0
    for _, content in turns:
        at = joined(response).index(content, at) + len(content)
    answers = "".join(content for role, content in turns if role == "assistant")
    spoken = "".join(s.text for s in response if s.trained and not s.special)
    assert spoken.replace(" ", "") == answers.replace(" ", "")


@settings(max_examples=100)
@given(
    st.lists(
        st.sampled_from(["### Human:", "### Assistant:", " ", "a", "\n", "###"]), max_size=12
    ).map("".join)
)
def test_flattened_chats_are_cut_without_loss(text):
    form = FORMATS["guanaco"]
    if "### Assistant:" not in text:
        with pytest.raises(ValueError, match="train_on='all'"):
            form.segments({"text": text})
        return
    segments = form.segments({"text": text})
    assert joined(segments) == text
    assert all("### Human:" not in answer for answer in trained(segments))


def test_last_trains_what_answers_the_last_question():
    for row in rows_of("oasst1_best_replies.jsonl"):
        text = {"text": row["guanaco_text"]}
        segments = FORMATS["guanaco"].segments(text, "last")
        assert joined(segments) == row["guanaco_text"]
        assert trained(segments) == [" " + row["output"]]
    turns = ["assistant", "user", "assistant", "assistant", "user"]
    row = {"messages": [{"role": role, "content": str(i)} for i, role in enumerate(turns)]}
    assert trained(FORMATS["messages"].segments(row, "last")) == [" 2", " 3"]
    row = {"messages": row["messages"][:1]}
    assert trained(FORMATS["messages"].segments(row, "last")) == [" 0"]
    pair = {"input": "Why?", "output": "So."}
    assert trained(FORMATS["input-output"].segments(pair, "last")) == [" So."]


def test_text_is_trained_on_whole():
    for train_on in ("response", "last", "all"):
        assert FORMATS["text"].segments({"text": "a b"}, train_on) == (Segment("a b", True),)


def test_columns_decide_the_format():
    assert detect_format(["instruction", "input", "output"]).name == "alpaca"
    assert detect_format(["instruction", "output", "id"]).name == "alpaca"
    assert detect_format(["input", "output", "source", "subset"]).name == "input-output"
    assert detect_format(["prompt", "completion"]).name == "prompt-completion"
    assert formats_for(["messages"]) == ["messages", "messages-chatml"]
    with pytest.raises(
        ValueError, match=r"messages-chatml all take: .*where chat-template is the model"
    ):
        detect_format(["messages"])
    with pytest.raises(
        ValueError, match=r"columns a, b, which no prompt format takes.*alpaca: ins"
    ):
        detect_format(["a", "b"])


def test_wrong_columns_are_refused_with_what_would_take_them():
    check_columns(["output", "instruction"], FORMATS["alpaca"])
    message = (
        "rows.json has the columns prompt, completion, but the format 'alpaca' needs instruction, "
        "output (instruction, output missing); the format 'prompt-completion' would take it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_columns(["prompt", "completion"], FORMATS["alpaca"], source="rows.json")
    with pytest.raises(ValueError, match=r"no format takes these columns\. Say what is which"):
        check_columns(["question"], FORMATS["text"])
    with pytest.raises(ValueError, match=r"\(none\)"):
        check_columns([], FORMATS["text"])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("alpaca", {"instruction": "a", "output": None}, "text in the column 'output'.*None"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "column 'input'.*holds 3"),
        ("text", {"text": ["a" * 200]}, r"column 'text'.*\.\.\."),
        ("messages", {"messages": []}, r"list of turns.*\[\]"),
        ("messages", {"messages": "hello"}, "list of turns.*'hello'"),
        ("messages", {"messages": [{"role": "tool", "content": "a"}]}, "role .user, assistant"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "text content"),
        ("messages", {"messages": ["hello"]}, "the turn 'hello'"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]},
            r"no way to write a call of a tool.*'add'.*chat-template",
        ),
    ],
)
def test_bad_values_are_refused(name, row, message):
    with pytest.raises(ValueError, match=message):
        FORMATS[name].segments(row)


def test_bad_names_are_refused():
    assert get_format("alpaca") is FORMATS["alpaca"]
    with pytest.raises(ValueError, match="no prompt format 'alpacca'; the formats are alpaca"):
        get_format("alpacca")
    # Below the signatures, whose Literal is checked here and not where users are.
    with pytest.raises(
        ValueError, match="train_on is 'answers', but must be 'response', 'last' or 'all'"
    ):
        trains_on_all("answers")
