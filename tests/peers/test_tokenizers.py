"""Tokenizers saved here, with added tokens, read by transformers."""

import json
import shutil

import pytest

from qlora_jax.data import ChatTemplate, ChatTemplateFormat, load_tokenizer, tokenize_rows
from tests.data.test_encode import TEMPLATES
from tests.shared import shared_path

transformers = pytest.importorskip("transformers", reason="make test-peers installs it")

PLAIN = ["Once upon a time, there was a girl.", "two\n lines", "x"]
# A folder or a file, and the class that transformers is to take where no configuration names it.
CASES = {
    "llama2": ("tokenizers/llama2/tokenizer.json", "LlamaTokenizer"),
    "llama2, SentencePiece": ("tokenizers/llama2/tokenizer.model", "LlamaTokenizer"),
    "mistral, SentencePiece": ("tokenizers/mistral-v0.1/tokenizer.model", "LlamaTokenizer"),
    "stories260K, SentencePiece": ("models/stories260K", None),
    "smollm2": ("models/smollm2-135m-instruct", None),
    "t5": ("tokenizers/t5/spiece.model", "T5Tokenizer"),
}


@pytest.fixture(params=CASES)
def folder(request, tmp_path):
    source, named = CASES[request.param]
    path = shared_path(f"data/{source}")
    target = tmp_path / "source"
    target.mkdir()
    for file in path.iterdir() if path.is_dir() else [path]:
        if "token" in file.name or file.name == "spiece.model":
            shutil.copy(file, target)
    if named is not None:
        (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    if request.param == "t5":
        # Its sentinels stand in a tokenizer.json alone.
        transformers.AutoTokenizer.from_pretrained(target).save_pretrained(target)
    return target


def test_auto_tokenizer_reads_what_is_saved(folder, tmp_path):
    ours = load_tokenizer(folder).with_tokens(["<|x|>", "<|y|>"])
    ours.save(tmp_path / "saved")
    before, after = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "saved")
    )
    assert len(after) == len(before) + 2 == ours.vocab_size
    tokens = ["<|x|>", "<|y|>", before.eos_token]
    assert after.convert_tokens_to_ids(tokens) == [ours.token_id(token) for token in tokens]
    for text in PLAIN:
        ids = after(text)["input_ids"]
        assert ids == before(text)["input_ids"]
        bare = after(text, add_special_tokens=False)["input_ids"]
        assert bare == ours.encode(text, bos=False)
        marked = after(f"{text}<|x|>", add_special_tokens=False)["input_ids"]
        assert marked == ours.encode(f"{text}<|x|>", bos=False, special=True)
        assert "<|x|>" in after.decode(marked)
        assert "<|x|>" not in after.decode(marked, skip_special_tokens=True)


@pytest.mark.parametrize("file", ["llama2/tokenizer.json", "mistral-v0.1/tokenizer.json"])
def test_conversations_have_the_ids_that_transformers_gives_them(file):
    path = shared_path(f"data/tokenizers/{file}")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="</s>"
    )
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A sea.\n\nOr"},
        {"role": "user", "content": "  two "},
        {"role": "assistant", "content": "two."},
    ]
    for source in TEMPLATES.values():
        expected = theirs.apply_chat_template(messages, chat_template=source, return_dict=False)
        form = ChatTemplateFormat(ChatTemplate(source, {"eos_token": "</s>"}))
        ours = load_tokenizer(path)
        (example,) = tokenize_rows([{"messages": messages}], form, ours, append_eos=False)
        # Theirs has the line break behind the last eos, which ours leaves out.
        assert list(example.input_ids) == expected[: len(example.input_ids)]
        assert theirs.decode(expected[len(example.input_ids) :]).strip() == ""
