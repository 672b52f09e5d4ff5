"""Conversations in a model's own template have the ids of the whole text, as when it is asked."""

import json
import random

import pytest

from qlora_jax.data import IGNORE, ChatTemplate, ChatTemplateFormat, load_tokenizer, tokenize_rows
from tests.shared import shared_path

# In the ways of Llama 2, where words follow a space; of Zephyr, where lines follow a special token;
# and of Alpaca, where words are followed by lines.
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
LINED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HEADED = (
    "<s>{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
TEMPLATES = {"spaced": SPACED, "lined": LINED, "headed": HEADED}
TOKENIZERS = {
    "llama2, json": "data/tokenizers/llama2/tokenizer.json",
    "llama2": "data/tokenizers/llama2/tokenizer.model",
    "mistral": "data/tokenizers/mistral-v0.1/tokenizer.json",
}
WORDS = ["Hi", "there.", "what?", "1+1", "é", "你好", "\n", "- item", '"q"', "###", "end.\n"]


def form_of(name: str) -> ChatTemplateFormat:
    return ChatTemplateFormat(ChatTemplate(TEMPLATES[name], {"eos_token": "</s>"}))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_ids_are_those_of_the_whole_text(template, tokenizer):
    tokenizer = load_tokenizer(shared_path(TOKENIZERS[tokenizer]))
    form, draw = form_of(template), random.Random(0)
    for _ in range(40):
        messages = [
            {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))}
            for role in ("user", "assistant") * draw.randint(1, 3)
        ]
        row = {"messages": messages}
        text = "".join(segment.text for segment in form.segments(row))
        (example,) = tokenize_rows([row], form, tokenizer, append_eos=False)
        assert list(example.input_ids) == tokenizer.encode(text, bos=False, special=True)
        # And the prompt of the last answer is the beginning of them, all of it untrained.
        prompt = form.template.render(messages[:-1], add_generation_prompt=True)
        asked = tokenizer.encode(prompt, bos=False, special=True)
        assert list(example.input_ids[: len(asked)]) == asked
        last = [i for i, label in enumerate(example.labels) if label != IGNORE]
        assert example.labels[len(asked) - 1] == IGNORE
        assert len(asked) in last


def test_a_marker_in_a_row_stays_characters():
    path = shared_path(TOKENIZERS["llama2, json"])
    tokenizer = load_tokenizer(path, bos_token="<s>", eos_token="</s>")
    messages = [
        {"role": "user", "content": "What is </s>?"},
        {"role": "assistant", "content": "An end."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Bye."},
    ]
    (example,) = tokenize_rows([{"messages": messages}], form_of("spaced"), tokenizer)
    ids = list(example.input_ids)
    assert ids.count(tokenizer.eos_token_id) == ids.count(tokenizer.bos_token_id) == 2
    # What follows the next marker is read as a whole again.
    later = "<s>[INST] Thanks. [/INST] Bye. </s>"
    whole = tokenizer.encode(later, bos=False, special=True)
    assert ids[-len(whole) :] == whole
    # What follows the row's words goes on with them, not with the marker before them.
    form = ChatTemplateFormat(ChatTemplate("<s>{{ messages[0]['content'] }}!"))
    rows, options = [{"messages": messages[:1]}], {"train_on": "all", "append_eos": False}
    (example,) = tokenize_rows(rows, form, tokenizer, **options)
    asked, end = (tokenizer.encode(text, continues=True) for text in ("What is </s>?", "!"))
    assert list(example.input_ids) == [tokenizer.bos_token_id, *asked, *end]


def test_no_token_straddles_the_prompt_and_the_answer(tmp_path):
    """A byte-level tokenizer with one token for a line break and a space."""
    vocabulary = {c: i for i, c in enumerate("<|>aQĊĠ")} | {"ĊĠ": 7, "<|>": 8}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": 8, "content": "<|>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["Ċ", "Ġ"]]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path, eos_token="<|>")
    source = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    form = ChatTemplateFormat(ChatTemplate(source))
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": " a"}]}
    assert tokenizer.encode("Q\n a\n", special=True) == [4, 7, 3, 5]
    (example,) = tokenize_rows([row], form, tokenizer, append_eos=False)
    assert list(example.input_ids) == [4, 5, 6, 3, 5]
    assert list(example.labels) == [IGNORE, IGNORE, 6, 3, 5]
