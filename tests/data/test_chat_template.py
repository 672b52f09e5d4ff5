"""Chat templates: against texts written by hand, and what a template can and cannot do."""

import datetime
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import (
    IGNORE,
    ChatTemplate,
    ChatTemplateFormat,
    load_chat_template,
    load_rows,
    load_tokenizer,
    tokenize_rows,
)
from tests.shared import shared_path

# A template in the way of many: bos in front, contents trimmed, no line break behind a turn.
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system turns come first') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# The same, saying itself what an assistant writes.
MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] "
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}{% endif %}{% endfor %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello.\n"},
    {"role": "user", "content": "</s>?"},
    {"role": "assistant", "content": "An end."},
]


def form_of(source: str, **options) -> ChatTemplateFormat:
    return ChatTemplateFormat(ChatTemplate(source, TOKENS), **options)


def text(segments) -> str:
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize("source", [TRIMMED, MARKED])
def test_by_hand(source):
    form = form_of(source)
    segments = form.segments({"messages": HELLO})
    assert text(segments) == (
        "<s>[user] Hi[assistant] Hello.</s>[user] </s>?[assistant] An end.</s>"
    )
    assert [s.text for s in segments if s.trained] == ["Hello.", "</s>", "An end.", "</s>"]
    # The row's own "</s>" is five characters, the template's are markers.
    assert [s.text for s in segments if not s.special] == ["Hi", "Hello.", "</s>?", "An end."]
    assert text(form.segments({"messages": HELLO}, "all")) == text(segments)
    assert all(s.trained for s in form.segments({"messages": HELLO}, "all"))
    # An answer that begins where it is prompted for is the last one, too.
    prompt = "{% if add_generation_prompt %}[assistant] {% endif %}"
    prompted = form_of(source.removesuffix(prompt) + prompt)
    segments = prompted.segments({"messages": HELLO}, "last")
    assert [s.text for s in segments if s.trained] == ["An end.", "</s>"]


def test_smollm2_by_hand_and_to_ids():
    folder = shared_path("data/models/smollm2-135m-instruct")
    template = load_chat_template(folder)
    assert template.name == "smollm2-135m-instruct"
    assert template.special_tokens["eos_token"] == "<|im_end|>"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n"
    )
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(messages[:1], add_generation_prompt=True) == system + asked
    segments = ChatTemplateFormat(template).segments({"messages": messages})
    # Without the line break behind the last eos, which nothing can be learnt from.
    assert text(segments) == system + asked + "Hello.<|im_end|>"
    assert [s.text for s in segments if s.trained] == ["Hello.", "<|im_end|>"]
    own = ChatTemplateFormat(template, system="Be brief.").segments({"messages": messages})
    assert text(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")

    tokenizer = load_tokenizer(folder)
    (example,) = tokenize_rows([{"messages": messages}], ChatTemplateFormat(template), tokenizer)
    whole = tokenizer.encode(system + asked + "Hello.<|im_end|>", special=True)
    assert list(example.input_ids) == whole
    trained = [i for i in example.labels if i != IGNORE]
    assert tokenizer.decode(trained, skip_special=False) == "Hello.<|im_end|>"


def test_a_template_writes_its_own_bos(tmp_path):
    stories = load_tokenizer(shared_path("data/models/stories260K"))
    (example,) = tokenize_rows([{"messages": HELLO[:2]}], form_of(TRIMMED), stories)
    assert list(example.input_ids).count(stories.bos_token_id) == 1
    assert list(example.input_ids).count(stories.eos_token_id) == 1
    assert example.labels[-1] == stories.eos_token_id
    # What ends an earlier turn does not end the text.
    (example,) = tokenize_rows([{"messages": HELLO[:3]}], form_of(TRIMMED), stories)
    assert list(example.input_ids).count(stories.eos_token_id) == 2
    assert (example.input_ids[-1], example.labels[-1]) == (stories.eos_token_id, IGNORE)


CHARACTERS = st.characters(exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3")
TURN = st.tuples(st.sampled_from(["user", "assistant"]), st.text(CHARACTERS, max_size=12))


@settings(max_examples=100)
@given(st.lists(TURN, min_size=1, max_size=5))
def test_both_ways_to_find_the_answers_agree(turns):
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    ours, told = form_of(TRIMMED).segments(row), form_of(MARKED).segments(row)
    assert text(ours) == text(told)
    # A template without marks begins an answer where it prompts for one; so does ours.
    assert ours == told
    assert form_of(TRIMMED).segments(row, "last") == form_of(MARKED).segments(row, "last")
    assert text(s for s in ours if not s.special) == "".join(c.strip() for _, c in turns)


# In the way of Qwen3: the answers to the last question alone are written with their reasoning.
FORGETTING = (
    "{% set last = namespace(question=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.question = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}[{{ m['role'] }}] "
    "{% if m['role'] == 'assistant' and loop.index0 > last.question %}"
    "<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_of_a_template_that_rewrites_earlier_turns_the_last_answers_are_trained():
    called = {"role": "assistant", "content": "Add.", "reasoning_content": "A sum."}
    told = {"role": "tool", "content": "3"}
    conversation = [*HELLO[:2], {"role": "user", "content": "1 + 2?"}, called, told, HELLO[3]]
    form = form_of(FORGETTING)
    segments = form.segments({"messages": conversation}, "last")
    assert text(segments) == (
        "[user] Hi</s>[assistant]  Hello.\n</s>[user] 1 + 2?</s>[assistant] <think>A sum.</think>"
        "Add.</s>[tool] 3</s>[assistant] <think></think>An end.</s>"
    )
    assert [s.text for s in segments if s.trained] == [
        "<think>", "A sum.", "</think>", "Add.", "</s>", "<think></think>", "An end.", "</s>"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="writes turn 1 of a conversation differently when others"):
        form.segments({"messages": conversation})
    assert all(s.trained for s in form.segments({"messages": conversation}, "all"))
    # A question that nobody answers takes the reasoning out of all answers.
    with pytest.raises(ValueError, match="writes turn 3 of a conversation differently"):
        form.segments({"messages": [*conversation, HELLO[0]]}, "last")


# In the way of Qwen3: what stands before "</think>" in an answer is written anew.
THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "<think>{{ content.split('</think>')[0].split('<think>')[-1] }}</think>"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_an_answer_that_a_template_takes_apart_leaves_the_other_borders(train_on):
    messages = [
        {"role": "user", "content": "Is <|im_end|> a word?"},
        {"role": "assistant", "content": "<think>Hm.</think>No."},
    ]
    template = ChatTemplate(THINKING, {"eos_token": "<|im_end|>"})
    segments = ChatTemplateFormat(template).segments({"messages": messages}, train_on)
    # Borders of the question alone: the template's own markers around the answer stay markers.
    assert [s.text for s in segments if not s.special] == ["Is <|im_end|> a word?"]
    assert text(segments).endswith("assistant\n<think>Hm.</think>No.<|im_end|>")
    if train_on == "response":
        assert text(s for s in segments if s.trained) == "<think>Hm.</think>No.<|im_end|>"


def test_contents_of_which_some_are_trimmed_all_have_borders():
    source = (
        "{% for m in messages %}{{ m['content'] if loop.first else m['content'] | trim }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": " b "}]
    segments = form_of(source).segments({"messages": messages}, "all")
    assert [(s.text, s.special) for s in segments] == [(" a b", False)]


def test_a_template_that_cuts_its_own_generation_apart_is_refused():
    cut = "{% set x %}{% generation %}a b{% endgeneration %}{% endset %}{{ x.split(' ')[0] }}"
    with pytest.raises(ValueError, match="cuts apart what it has written between"):
        form_of(cut).segments({"messages": HELLO})


def test_an_eos_in_an_answer_does_not_end_what_is_trained():
    bare = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    prompted = bare + "{% if add_generation_prompt %}[assistant] {% endif %}"
    answer = {"role": "assistant", "content": "</s> ends a text."}
    segments = form_of(prompted).segments({"messages": [HELLO[0], answer]})
    assert text(s for s in segments if s.trained) == "</s> ends a text.\n"


def test_a_first_turn_that_cannot_be_prompted_for_is_refused():
    looking = "{% if messages[0]['role'] == 'system' %}{% endif %}" + TRIMMED
    form = form_of(looking)
    assert form.segments({"messages": HELLO})[-1].trained
    with pytest.raises(ValueError, match="turn 0 of a conversation cannot be prompted for"):
        form.segments({"messages": HELLO[1:]})
    assert all(s.trained for s in form.segments({"messages": HELLO[1:]}, "all"))


def test_an_eos_behind_the_last_turn_alone_is_trained_there():
    """In the way of Phi-3, whose turns end with a token of their own."""
    source = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    )
    segments = form_of(source).segments({"messages": HELLO})
    assert text(segments).endswith("An end.<|end|>\n</s>")
    trained = text(s for s in segments if s.trained)
    assert trained == " Hello.\n<|end|>\nAn end.<|end|>\n</s>"


def test_contents_that_a_template_rewrites_are_read_as_transformers_reads_them():
    segments = form_of("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}").segments(
        {"messages": HELLO}, "all"
    )
    # No border could be seen, so all of it is the template's. (Marks have no upper case, but ours
    # do not hide that the plain text is another.)
    assert text(segments) == "HI HELLO.\n</S>?AN END."


# In the way of Qwen: tools in front, an answer with its reasoning and its calls.
TOOLS = (
    "{% if tools is not none %}[tools] {{ tools | tojson(separators=(',', ':')) }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] "
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content is defined %}{{ m['content'] }}{% endif %}"
    "{% for call in m.tool_calls or () %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_tools_calls_and_reasoning_are_written_and_trained(tmp_path):
    calls = [{"function": {"name": "weather", "arguments": {"city": "é"}}}]
    other = [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
    rows = [
        {
            "tools": json.dumps([{"name": "weather"}]),
            "messages": [
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "content": "no"},
                {"role": "assistant", "content": "No.", "reasoning": "Dry </s>."},
            ],
        },
        {
            "tools": None,
            "messages": [
                {"role": "user", "content": "1 + 2"},
                {"role": "assistant", "content": "", "tool_calls": other},
            ],
        },
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The columns of Arrow give each turn, call and argument the keys of all others, as None.
    for read in (rows, load_rows(file, cache_dir=tmp_path)):
        first, second = (form_of(TOOLS).segments(row) for row in read)
        assert text(first) == (
            '[tools] [{"name":"weather"}][user] Rain?[assistant] '
            '<call>{"name": "weather", "arguments": {"city": "é"}}</call></s>'
            "[tool] no[assistant] <think>Dry </s>.</think>No.</s>"
        )
        assert text(s for s in first if s.trained) == (
            '<call>{"name": "weather", "arguments": {"city": "é"}}</call></s>'
            "<think>Dry </s>.</think>No.</s>"
        )
        assert "Dry </s>." in [s.text for s in first if not s.special]
        assert text(second).endswith(
            '[assistant] <call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call></s>'
        )


def test_a_column_of_tools_may_have_gaps():
    def written(tools):
        return text(form_of(TOOLS).segments({"tools": tools, "messages": HELLO[:1]}))

    assert written([{"name": "add", "strict": None}]) == '[tools] [{"name":"add"}][user] Hi'
    assert [written(nothing) for nothing in (None, "", [])] == ["[user] Hi"] * 3


def test_names_that_templates_know():
    source = (
        "{{ documents is none }} {{ messages[0].thinking }} {{ messages[0].reasoning_content }}"
    )
    for key in ("reasoning_content", "thinking", "reasoning"):
        assert ChatTemplate(source).render([{"role": "assistant", key: "Hm."}]) == "True Hm. Hm."


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tools": "[", "messages": HELLO}, "'tools' is not valid JSON"),
        ({"tools": ["add"], "messages": HELLO}, r"list of JSON schemas, but a row holds \['add'\]"),
        ({"messages": [{"role": "assistant", "content": None}]}, "a role and a text content"),
    ],
)
def test_bad_tools_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        form_of(TOOLS).segments(row)


def test_a_template_writes_the_date_it_is_given():
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %H:%M') }}{% endif %}"
    given = ChatTemplate(source, date=datetime.date(2024, 7, 26)).render(HELLO)
    assert given == "26 Jul 2024, 00:00"
    today = datetime.datetime.now()
    written = datetime.datetime.strptime(ChatTemplate(source).render(HELLO), "%d %b %Y, %H:%M")
    assert abs(written - today) < datetime.timedelta(minutes=5)


def test_lines_that_hold_a_block_alone_are_not_written():
    """As transformers has it, whose loops may break off, too."""
    source = (
        "{% for m in messages %}\n  {% if not loop.first %}\n    {% break %}\n  {% endif %}\n"
        "{{ m['content'] }}\n{% endfor %}\n"
    )
    assert ChatTemplate(source).render(HELLO) == "Hi\n"


def test_templates_run_in_a_sandbox():
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ):
        with pytest.raises((ValueError, OverflowError)):
            ChatTemplate("{% set m = messages %}" + attack).render(list(HELLO))


def test_bad_input(tmp_path):
    with pytest.raises(
        ValueError, match="does not take this conversation: system turns come first"
    ):
        form_of(TRIMMED).segments({"messages": [*HELLO, {"role": "system", "content": "No."}]})
    with pytest.raises(ValueError, match=r"not valid Jinja \(line 1"):
        form_of("{% for %}").segments({"messages": HELLO})
    with pytest.raises(ValueError, match="noncharacter"):
        form_of(TRIMMED).segments({"messages": [{"role": "user", "content": "\ufdd2"}]})
    with pytest.raises(ValueError, match=r"list of turns.*None"):
        form_of(TRIMMED).segments({"messages": None})
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        load_chat_template(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no chat template 'default' \(it has none\)"):
        load_chat_template(tmp_path)
    for template in (3, ["a"], [{"name": "default"}]):
        config = json.dumps({"chat_template": template})
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(ValueError, match=r"chat_template .*, but a template or a list"):
            load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is no text in UTF-8"):
        load_chat_template(tmp_path)


def test_where_templates_are_found(tmp_path):
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config = {"chat_template": several, "eos_token": {"content": "</s>"}, "pad_token": None}
    config["extra_special_tokens"] = more = {"image_token": "<img>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    token_map = {"eos_token": "<end>", "bos_token": "<s>"}  # the configuration speaks first
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(token_map))
    assert load_chat_template(tmp_path).source == "a"
    assert load_chat_template(tmp_path, "tool_use").source == "b"
    assert load_chat_template(tmp_path).special_tokens == TOKENS | more
    with pytest.raises(ValueError, match=r"'rag' \(it has default, tool_use\)"):
        load_chat_template(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_text("c")
    assert load_chat_template(tmp_path).source == "c"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("d")
    assert load_chat_template(tmp_path, "rag").source == "d"
