"""Both kinds of tokenizer, against each other and against ids published elsewhere, on real text."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import Tokenizer, load_tokenizer
from tests.shared import shared_path


def load(relative: str, **options) -> Tokenizer:
    return load_tokenizer(shared_path(f"data/{relative}"), **options)


@pytest.fixture(scope="module")
def llama2() -> tuple[Tokenizer, Tokenizer]:
    """The fast and the SentencePiece form of the same tokenizer."""
    return (
        load("tokenizers/llama2/tokenizer.json", eos_token="</s>"),
        load("tokenizers/llama2/tokenizer.model"),
    )


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """Instructions, 34 languages of OASST1, stories, and an encyclopedia with its odd spacing."""
    instruct = shared_path("data/instruct")
    texts = [row["output"] for row in json.loads((instruct / "alpaca.json").read_text())[:500]]
    replies = (instruct / "oasst1_best_replies.jsonl").read_text().split("\n")
    texts += [json.loads(line)["guanaco_text"] for line in replies if line][:300]
    text = shared_path("data/text")
    texts += (text / "tinystories.txt").read_text().split("<|endoftext|>")[:50]
    texts += (text / "wikitext2_raw_test.txt").read_text().split("\n")[:500]
    return texts


def test_llama_ids_known_from_elsewhere(llama2):
    for tokenizer in llama2:
        assert tokenizer.encode("Hello world") == [1, 15043, 3186]
        assert tokenizer.encode("Hello world", bos=False, eos=True) == [15043, 3186, 2]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.add_bos
        assert tokenizer.vocab_size == 32000
        assert tokenizer.name == "llama2"


def test_the_two_llama_forms_agree_on_real_text(llama2, real_texts):
    fast, piece = llama2
    for continues in (False, True):
        left = fast.encode_batch(real_texts, continues=continues)
        right = piece.encode_batch(real_texts, continues=continues)
        assert left == right
    for ids in left[::20]:
        assert fast.decode(ids) == piece.decode(ids)


def test_the_two_mistral_forms_agree_on_real_text(real_texts):
    fast = load("tokenizers/mistral-v0.1/tokenizer.json", eos_token="</s>")
    piece = load("tokenizers/mistral-v0.1/tokenizer.model")
    assert fast.encode_batch(real_texts) == piece.encode_batch(real_texts)
    assert (fast.bos_token_id, fast.eos_token_id) == (piece.bos_token_id, piece.eos_token_id)


def test_t5_ids_known_from_elsewhere():
    t5 = load("tokenizers/t5")
    # From the T5 documentation of Hugging Face: "The <extra_id_0> walks in <extra_id_1> park".
    assert t5.encode("translate English to German: The house is wonderful.", eos=True) == [
        *(13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1)
    ]
    assert t5.bos_token_id is None
    assert not t5.add_bos
    assert (t5.eos_token_id, t5.pad_token_id) == (1, 0)
    with pytest.raises(ValueError, match="has no bos token: give load_tokenizer bos_token"):
        t5.encode("a", bos=True)
    assert not load("tokenizers/t5", add_bos=True).add_bos


def test_stories260k_against_the_recorded_batches():
    tokenizer = load("models/stories260K")
    assert tokenizer.add_bos
    assert tokenizer.vocab_size == 512
    assert tokenizer.encode("Once upon a time, there was a little girl")[:5] == [
        *(1, 403, 407, 261, 378)
    ]
    with np.load(shared_path("data/reference/stories260K/train_batches.npz")) as batches:
        ids = batches["input_ids"].reshape(-1).tolist()
    # Stories stand one after the other, each with its bos: encode them again.
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id]
    assert len(starts) > 50
    again = 0
    for start, end in pairwise(starts):
        story = tokenizer.decode(ids[start:end])
        again += tokenizer.encode(story) == ids[start:end]
    # Stories torn apart where one row of the recording ends and another begins need not survive.
    assert again >= 0.9 * (len(starts) - 1)


def test_smollm2_says_what_its_config_says():
    tokenizer = load("models/smollm2-135m-instruct")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # A GPT-2 tokenizer: it has a bos, but its texts do not begin with one.
    assert not tokenizer.add_bos
    assert tokenizer.encode("1234 is") == tokenizer.encode("1234", bos=False) + tokenizer.encode(
        " is"
    )
    assert len(tokenizer.encode("1234")) == 4
    assert tokenizer.encode("<|im_start|>user\n", special=True)[0] == 1
    assert tokenizer.encode("<|im_start|>user\n")[0] != 1
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.decode([1, 2], skip_special=False) == "<|im_start|><|im_end|>"


def test_text_is_only_text(llama2):
    for tokenizer in llama2:
        plain = tokenizer.encode("<s>struck</s> out", bos=False)
        assert not {1, 2} & set(plain)
        assert tokenizer.decode(plain) == "<s>struck</s> out"
        marked = tokenizer.encode("<s>struck</s>", bos=False, special=True)
        assert (marked[0], marked[-1]) == (1, 2)
        assert "struck" in tokenizer.decode(marked)
        assert tokenizer.encode("a</s> b<s>c", special=True, continues=True)[0] != 2
        assert tokenizer.decode(marked, skip_special=False).startswith("<s>")


def test_the_two_llama_forms_agree_on_special_tokens(llama2):
    fast, piece = llama2
    for text in ("<s>a</s> b<s>c", "</s>", "a<s>", "<s> <s>", "<unk>a", "no marker"):
        for continues in (False, True):
            for special in (False, True):
                options = {"continues": continues, "special": special}
                assert fast.encode(text, **options) == piece.encode(text, **options)
    ids = [1, 0, 13863, 0, 2]
    assert fast.decode(ids) == piece.decode(ids) == fast.decode([13863])
    for tokenizer in llama2:
        assert tokenizer.decode(ids, skip_special=False).count("<unk>") == 2


def test_what_t5_does_not_know_is_left_out_of_an_answer():
    """It writes <unk> for what its pieces cannot say, such as braces."""
    t5 = load("tokenizers/t5")
    ids = t5.encode("a {b}", eos=True)
    assert ids.count(2) == 2
    assert "⁇" not in t5.decode(ids)
    assert t5.decode(ids, skip_special=False).endswith("<unk></s>")


def test_what_a_post_processor_puts_around_a_text(tmp_path):
    """Families without any configuration beside their tokenizer.json, framed by hand."""
    spec = json.loads(shared_path("data/tokenizers/llama2/tokenizer.json").read_text())
    spec["model"]["vocab"] = {k: v for k, v in spec["model"]["vocab"].items() if v < 300}
    spec["model"]["merges"] = []
    special = {
        t: {"id": t, "ids": [i], "tokens": [t]} for i, t in enumerate(["<unk>", "<s>", "</s>"])
    }

    def load_framed(*frame: str) -> Tokenizer:
        single = [
            {"Sequence": {"id": "A", "type_id": 0}}
            if part == "A"
            else {"SpecialToken": {"id": part, "type_id": 0}}
            for part in frame
        ]
        spec["post_processor"] = {
            **{"type": "TemplateProcessing", "single": single, "pair": single},
            "special_tokens": special,
        }
        spec["post_processor"]["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        return load_tokenizer(tmp_path)

    for frame, bos in ((("<s>", "A"), 1), (("A",), None), (("A", "</s>"), None)):
        tokenizer = load_framed(*frame)
        assert (tokenizer.bos_token_id, tokenizer.add_bos) == (bos, bos is not None)
    # Framed on both sides it may be BERT's [CLS]: only a configuration can call it a bos.
    assert load_framed("<s>", "A", "</s>").bos_token_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert load_framed("<s>", "A", "</s>").add_bos
    assert not load_framed("A", "</s>").add_bos


LOSSLESS = (
    "tokenizers/llama2/tokenizer.model",
    "models/stories260K",
    "models/smollm2-135m-instruct",
    "tokenizers/llama2/tokenizer.json",
)


@pytest.fixture(scope="module")
def lossless() -> list[Tokenizer]:
    return [load(name, eos_token=None if "smol" in name else "</s>") for name in LOSSLESS]


# SmolLM2's 49,152 pieces lack some control characters and bytes of the planes beyond the first;
# "▁" is SentencePiece's own spelling of a space.
CHARACTERS = st.characters(
    max_codepoint=0xFFFF,
    exclude_categories=["Cs", "Cc"],
    include_characters="\n\t",
    exclude_characters="▁",
)


@settings(max_examples=150)
@given(pieces=st.lists(st.text(CHARACTERS, min_size=1, max_size=12), max_size=4))
def test_pieces_encoded_one_by_one_decode_to_their_text(lossless, pieces):
    for tokenizer in lossless:
        ids = [
            token
            for index, piece in enumerate(pieces)
            for token in tokenizer.encode(piece, continues=index > 0)
        ]
        assert tokenizer.decode(ids) == "".join(pieces)
        for piece in pieces:
            rest = tokenizer.encode(piece, continues=True)
            assert tokenizer.decode(rest, continues=True) == piece


def test_half_a_surrogate_pair_is_refused(llama2):
    """JSON may hold one."""
    for tokenizer in llama2:
        with pytest.raises(ValueError, match=r"'a\\ud83d' holds half a surrogate pair"):
            tokenizer.encode_batch(["b", "a\ud83d"])


def test_nothing_encodes_to_what_the_family_begins_with(lossless):
    assert [tokenizer.encode("") for tokenizer in lossless] == [[1], [1], [], [1]]
    assert [tokenizer.encode_batch([]) for tokenizer in lossless] == [[]] * 4


@pytest.mark.parametrize(
    "file",
    [
        "tokenizers/llama2/tokenizer.json",
        "tokenizers/llama2/tokenizer.model",
        "tokenizers/mistral-v0.1/tokenizer.model",
        "tokenizers/t5/spiece.model",
        "models/stories260K/tokenizer.model",
    ],
)
def test_added_tokens(file, tmp_path):
    before = load(file)
    # One that it has, and one twice.
    added = before.with_tokens(["<|x|>", "</s>", "<|y|>", "<|x|>"])
    x, y = before.vocab_size, before.vocab_size + 1
    assert [added.token_id(token) for token in ("<|x|>", "<|y|>")] == [x, y]
    assert added.token_id("</s>") == before.token_id("</s>")
    assert (added.vocab_size, before.token_id("<|x|>")) == (y + 1, before.token_id("<unused>"))
    added.save(tmp_path)
    again = load_tokenizer(tmp_path)
    twice = again.with_tokens(["<|z|>"])
    assert twice.token_id("<|z|>") == y + 1
    texts = ["Once upon a time, there was a girl.", "a<|x|>", " two\n lines ", "<|y|>", ""]
    for tokenizer in (added, again, twice):
        # What a text says is not read as a token.
        for continues in (False, True):
            options = {"continues": continues}
            assert tokenizer.encode_batch(texts, **options) == before.encode_batch(texts, **options)
        marked = tokenizer.encode("Once<|x|>upon a<|y|>", bos=False, special=True)
        once, upon = (before.encode(text, bos=False) for text in ("Once", "upon a"))
        assert marked == [*once, x, *upon, y]
        assert "<|" not in tokenizer.decode(marked)
        assert tokenizer.decode(marked, skip_special=False).count("<|x|>") == 1


def test_what_a_file_cuts_pads_and_puts_in_front_is_not_the_texts(tmp_path):
    spec = {
        "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            **{"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
        },
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "Ġ": 1}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("aaa") == [1, 0, 0, 0]
    assert tokenizer.encode("aaa", continues=True) == [0, 0, 0]


def test_sentencepiece_itself_reads_added_tokens(tmp_path):
    load("tokenizers/llama2/tokenizer.model").with_tokens(["<|x|>", "é"]).save(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.vocab_size() == 32001  # "é" is a piece of its own already
    assert processor.id_to_piece(32000) == "<|x|>"
    assert processor.is_control(32000)


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("newer", [False, True])
def test_tokens_that_stand_beside_a_vocabulary(newer, file, tmp_path):
    """As folders of finetuned Llamas have them, since before there was a tokenizer.json; and as
    those have them to which the base's was copied."""
    shutil.copy(shared_path(f"data/tokenizers/llama2/{file}"), tmp_path)
    config = {"pad_token": "[PAD]", "eos_token": "</s>"}
    listed = {"<|im|>": 32001, "[PAD]": 32000, "<s>": 1}
    if newer:
        config["added_tokens_decoder"] = {
            str(id_): {"content": token, "special": token != "<|im|>"}
            for token, id_ in listed.items()
        }
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps(listed))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (32002, 32000)
    # As transformers' LlamaTokenizer; only special tokens stay text where a text is only text.
    # (Of a tokenizer.json to the token: behind it a text begins anew, with one more space.)
    text, ids = "a <|im|> b", [1, 263, 29871, 32001, 289]
    if file == "tokenizer.json":
        text, ids = text.removesuffix(" b"), ids[:-1]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("[PAD]", special=True) == [1, 32000]
    assert 32000 not in tokenizer.encode("[PAD]")
    assert tokenizer.with_tokens(["<|z|>"]).token_id("<|z|>") == 32002
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(text) == ids
    if not newer:
        (tmp_path / "added_tokens.json").write_text(json.dumps(listed | {"<|x|>": 32005}))
        with pytest.raises(ValueError, match=r"the ids 32000, 32001, 32005, not the next ones"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"extra_ids": 100}),
        ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}),
        ("config.json", {"model_type": "t5"}),
    ],
)
def test_a_t5s_sentinels_keep_their_ids(name, content, tmp_path):
    shutil.copy(shared_path("data/tokenizers/t5/spiece.model"), tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"100 sentinels .* make a tokenizer.json"):
        load_tokenizer(tmp_path).with_tokens(["<|x|>"])


@given(st.lists(st.sampled_from("a 🧿é") | st.binary(min_size=1, max_size=4), max_size=6))
def test_bytes_of_no_character_leave_those_of_others_whole(llama2, parts):
    """In a text that breaks off within one: `tokenizers` would lose its neighbours."""
    fast, piece = llama2
    ids = [
        id_
        for part in parts
        for id_ in (
            [piece.token_id(f"<0x{byte:02X}>") for byte in part]
            if isinstance(part, bytes)
            else piece.encode(part, bos=False, continues=True)
        )
    ]
    whole = piece.decode(ids)
    assert fast.decode(ids) == whole
    for end in range(len(ids)):
        begun = fast.decode(ids[:end]).rstrip("\ufffd")
        assert whole.startswith(begun)


def test_ids_behind_the_last_piece_decode(tmp_path):
    """A T5 writes sentinels, and any model may write an id that only pads its vocabulary."""
    file = shared_path("data/tokenizers/t5/spiece.model")
    shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    t5, bare = load_tokenizer(tmp_path), load_tokenizer(file)
    ids = [32099, 363, 19, 32098, 32110, 1]
    # As transformers' own: T5Tokenizer(extra_ids=100).
    assert t5.decode(ids) == "What is"
    assert t5.decode(ids, skip_special=False) == "<extra_id_0>What is<extra_id_1></s>"
    assert bare.decode(ids, skip_special=False) == "What is</s>"


def test_special_tokens_come_from_where_the_folder_says(tmp_path):
    shutil.copy(shared_path("data/tokenizers/llama2/tokenizer.json"), tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="has no eos token"):
        load_tokenizer(tmp_path).encode("a", eos=True)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 5], "bos_token_id": 1}))
    assert load_tokenizer(tmp_path).eos_token_id == 2
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert load_tokenizer(tmp_path).eos_token_id == 1
    config = {"eos_token": "</s>", "pad_token": "<unk>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert load_tokenizer(tmp_path, add_bos=True).encode("Hello") == [1, 15043]
    assert load_tokenizer(tmp_path, eos_token="<unk>").eos_token_id == 0
    with pytest.raises(ValueError, match=r"eos token '</z>' is not in the vocabulary"):
        load_tokenizer(tmp_path, eos_token="</z>")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tokenizer_config.json", {"bos_token": 1}, "has bos_token 1, but a token is needed"),
        ("special_tokens_map.json", {"eos_token": {}}, "has eos_token {}, but a token"),
        ("tokenizer_config.json", {"add_bos_token": "false"}, "'false', but true or false"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"\[1\], but an object of"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": 1}}, "but an object of"),
        ("tokenizer_config.json", {"additional_special_tokens": 3}, "3, but a list of tokens"),
        ("added_tokens.json", {"<x>": "512"}, "has <x> '512', but a token id is needed"),
        ("added_tokens.json", [1], "added_tokens.json holds a JSON list, but an object"),
        ("tokenizer_config.json", None, "tokenizer_config.json holds null, but an object"),
    ],
)
def test_files_beside_a_vocabulary_of_another_kind_are_refused(tmp_path, name, fields, message):
    shutil.copyfile(
        shared_path("data/models/stories260K/tokenizer.model"), tmp_path / "tokenizer.model"
    )
    (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_bad_folders_and_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: expected a folder with tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected \*.json or \*.model"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.model is empty"):
        load_tokenizer(tmp_path)
    for content, message in (("{", "is not valid JSON"), ("{}", "has no 'model'")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(ValueError, match="is not a tokenizer of `tokenizers`"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
