"""Texts: stop texts cut, streams that join to the answer, chats through the template."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data import ChatTemplate, load_tokenizer
from qlora_jax.generate import Generation, GenerationConfig, chat, generate_text, newest_turns
from qlora_jax.generate.config import read_eos_token_ids
from qlora_jax.generate.text import cut_at, settled
from tests.generate.fake import Recurrent
from tests.shared import shared_path

MODEL = Recurrent(vocab=128)
GREEDY = GenerationConfig(max_new_tokens=12)


@dataclasses.dataclass(frozen=True)
class Ascii:
    """A tokenizer of 128 characters; 3 ends texts."""

    eos_token_id: int | None = None

    def encode(self, text, *, bos=None, special=False):
        return ([2] if bos is not False else []) + [ord(c) for c in text]

    def decode(self, ids, *, skip_special=True, continues=False):
        return "".join(chr(i) for i in ids if i != self.eos_token_id)


def texts(prompts, config=GREEDY, **options):
    answers = generate_text(MODEL, Ascii(), prompts, config, batch_size=2, **options)
    return [answer.text for answer in answers]


def test_one_text_is_one_prompt():
    assert texts("ab") == texts(["ab"])


def test_an_answer_is_cut_before_its_stop_text():
    plain = texts(["ab", "c"])
    stop = plain[0][4:6]
    config = dataclasses.replace(GREEDY, stop=(stop, "never"))
    first, second = generate_text(MODEL, Ascii(), ["ab", "c"], config, batch_size=2, every=5)
    assert first.text == plain[0][: plain[0].index(stop)]
    assert first.finish == "stop"
    assert first.tokens < 12
    assert second.text == cut_at(plain[1], [stop])
    # One that is complete with the last token there is room for stops it, too.
    config = dataclasses.replace(GREEDY, stop=plain[0])
    (whole,) = generate_text(MODEL, Ascii(), ["ab"], config, batch_size=2)
    assert whole == ("", 12, "stop")


def test_prompt_and_answer_read_on(monkeypatch):
    """A SentencePiece model drops the space in front of a text, but this is the middle of one."""
    tokenizer = load_tokenizer(shared_path("data/tokenizers/llama2/tokenizer.model"))
    story = "Once upon a time there was"
    written = tokenizer.encode(story)

    class Recites(Recurrent):
        """Says the next token of the story, whatever it has read."""

        def prefill(self, input_ids, attention_mask=None, *, cache_length):
            return self._say(attention_mask.sum(1)), attention_mask.sum(1)

        def decode_step(self, tokens, cache):
            return self._say(cache + 1), cache + 1

        def _say(self, read):
            return jax.nn.one_hot(jnp.asarray(written)[read], tokenizer.vocab_size)

    def answer(prompt, **options):
        count = len(written) - len(tokenizer.encode(prompt))
        config = GenerationConfig(max_new_tokens=count, stop=(" was",))
        pieces = []

        def show(_: int, piece: str) -> None:
            pieces.append(piece)

        found = generate_text(
            Recites(), tokenizer, [prompt], config, batch_size=1, on_text=show, every=1, **options
        )
        assert "".join(pieces) == found[0].text
        return found[0].text

    for prompt in ("Once", "Once upon", "Once upon a"):
        assert prompt + answer(prompt) == "Once upon a time there"
    assert answer("Once", special=True) == "upon a time there"
    # An encoder's prompt is another text than what the decoder writes.
    monkeypatch.setattr("qlora_jax.generate.text.reads_source", lambda model: True)
    assert answer("Once") == "upon a time there"


def test_the_tokenizers_end_token_ends_answers():
    plain = texts(["ab"])[0]
    ended = Ascii(eos_token_id=ord(plain[3]))
    answer = generate_text(MODEL, ended, ["ab"], GREEDY, batch_size=2)[0]
    assert answer.finish == "stop"
    assert answer.text == plain[: plain.index(plain[3])]


def test_an_end_token_may_have_the_id_0(monkeypatch):
    told = []

    def written(model, prompts, config, **options):
        told.append(config.eos_token_ids)
        return [Generation((), "stop")]

    monkeypatch.setattr("qlora_jax.generate.text.generate", written)
    generate_text(MODEL, Ascii(eos_token_id=0), ["ab"], GREEDY)
    assert told == [(0,)]


@pytest.mark.parametrize("stopping", [False, True])
def test_a_stream_joins_to_the_answer(stopping):
    stop = (texts(["ab"])[0][5:8],) if stopping else ()
    pieces = {0: [], 1: []}
    config = dataclasses.replace(GREEDY, stop=stop)
    found = texts(["ab", "c"], config, on_text=lambda i, piece: pieces[i].append(piece), every=5)
    assert ["".join(pieces[i]) for i in range(2)] == found
    assert len(pieces[1]) > 1


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one\n###two", ("###", "\n"), "one"),
        ("abc", ("abc", "b"), "a"),
        ("abc", ("bc", "abc"), ""),
        ("abc", ("x",), "abc"),
        ("abc", (), "abc"),
    ],
)
def test_the_stop_text_that_is_complete_first_decides(text, stop, left):
    assert cut_at(text, stop) == left


@given(st.text("ab#", max_size=12), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3))
def test_what_is_settled_never_changes(text, stop):
    shown = ""
    for end in range(len(text) + 1):
        ready = cut_at(text[:end], stop)
        ready = ready if len(ready) < end else settled(ready, stop)
        if len(ready) > len(shown):
            assert ready.startswith(shown)
            shown = ready
    assert cut_at(text, stop).startswith(shown)


def test_half_a_character_is_held_back():
    assert settled("gr\ufffd", ()) == "gr"


def test_a_chat_is_asked_through_its_template():
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    pieces, asked = [], []

    class Noting(Ascii):
        def encode(self, text, **options):
            asked.append((text, options))
            return super().encode(text, **options)

        def decode(self, ids, **options):
            return " " + super().decode(ids, **options)

    answer = chat(
        MODEL,
        Noting(),
        [{"role": "user", "content": "hi"}],
        template,
        GREEDY,
        on_text=pieces.append,
    )
    prompt = [ord(c) for c in "uhi;a"]
    first = int(jnp.argmax(MODEL.logits_after(prompt)))
    assert "".join(pieces).strip() == answer
    assert answer[0] == chr(first)
    # The template has written bos itself where the model wants it, and its markers are read.
    assert asked == [("uhi;a", {"bos": False, "special": True})]


def test_the_oldest_turns_make_room_and_no_others():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}!")
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [
        {"role": role, "content": 3 * name} for role, name in zip(roles, "sabcde", strict=True)
    ]
    for room, begins, tokens in ((None, 1, 19), (19, 1, 19), (18, 3, 13), (13, 3, 13), (12, 5, 7)):
        kept = [messages[0], *messages[begins:]]
        assert newest_turns(Ascii(), messages, template, room) == (kept, tokens)
    # Nobody has asked anything: there is no turn to leave out.
    assert newest_turns(Ascii(), messages[2:3], template, 1) == (messages[2:3], 4)
    # The last turn stays, whatever it takes.
    assert newest_turns(Ascii(), messages, template, 1) == ([messages[0], messages[5]], 7)


def test_end_tokens_of_a_folder(tmp_path):
    assert read_eos_token_ids(tmp_path) == ()
    # transformers reads them there where there is no generation_config.json.
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_eos_token_ids(tmp_path) == (5, 6)
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 7}')
    assert read_eos_token_ids(tmp_path) == (7,)
    file.write_text('{"eos_token_id": [7, 9]}')
    assert read_eos_token_ids(tmp_path) == (7, 9)
    file.write_text("{}")
    assert read_eos_token_ids(tmp_path) == ()
    for odd in ("1.5", "true", '["</s>"]', "1e30", str(10**30)):
        file.write_text(f'{{"eos_token_id": {odd}}}')
        with pytest.raises(ValueError, match=r"eos_token_id .*, but a token id or a list of them"):
            read_eos_token_ids(tmp_path)
    for ends in ((7,), (7, 9)):
        assert GREEDY.with_eos(ends).with_eos((1,)).eos_token_ids == ends
