"""`qlora-jax generate` and `chat` on a small model in a folder."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.embedded import ROOT
from experiments.paper.glue import tiny_roberta
from qlora_jax.checkpoints import save_model
from qlora_jax.checkpoints.adapter_config import WEIGHTS, config_to_json
from qlora_jax.cli import main
from qlora_jax.data import load_tokenizer
from qlora_jax.generate import GenerationConfig
from qlora_jax.models import DecoderConfig
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from tests.random_decoder import random_decoder

SMALL = ["--max-new-tokens", "5", "--temperature", "0", "--dtype", "float32", "--16-bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = DecoderConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    save_model(folder, random_decoder(config), dtype=jnp.dtype(jnp.float32))
    for file in (ROOT / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def test_generate_streams_one_prompt_and_lists_several(folder, capsys, monkeypatch):
    assert main(["generate", str(folder), "The file", *SMALL]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("The file")
    assert len(alone) > len("The file\n")
    assert main(["generate", str(folder), "The file", "A", *SMALL]) == 0
    assert capsys.readouterr().out.startswith(alone)
    monkeypatch.setattr("sys.stdin", io.StringIO("The file"))
    assert main(["generate", str(folder), *SMALL]) == 0
    assert capsys.readouterr() == (alone, "")
    assert main(["generate", str(folder), *SMALL, "The file"]) == 0
    assert capsys.readouterr() == (alone, "")
    assert main(["generate", str(folder), *SMALL, "--", "-x"]) == 0
    assert capsys.readouterr().out.startswith("-x")
    terminal = io.StringIO("The file")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["generate", str(folder), *SMALL]) == 0
    assert capsys.readouterr() == (alone, "The prompt, then Ctrl-D on a line of its own:\n")


@pytest.fixture
def chatting(folder, tmp_path):
    """The folder with a chat template."""
    chatting = tmp_path / "model"
    shutil.copytree(folder, chatting)
    tokenizer = json.loads((chatting / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (chatting / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return chatting


def test_chat_answers_turn_by_turn(chatting, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain\n\n"))
    assert main(["chat", str(chatting), "--system", "Be brief.", *SMALL]) == 0
    assert capsys.readouterr().out.count("> ") == 3


def test_a_conversation_that_outgrows_the_model_forgets_its_oldest_turns(
    chatting, capsys, monkeypatch
):
    seen, keys = [], set()

    def answer(model, tokenizer, messages, *_, key, **__):
        seen.append([message["content"] for message in messages])
        keys.add(str(jax.random.key_data(key)))
        return "yes"

    turns = ["one " * 20, "two " * 20, "three " * 70, "four " * 4, "five"]
    one, two, _, four, five = (turn.strip() for turn in turns)
    monkeypatch.setattr("qlora_jax.cli.chat.chat", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns)))
    assert main(["chat", str(chatting), "--system", "Be brief.", *SMALL]) == 0
    assert seen == [
        ["Be brief.", one],
        ["Be brief.", two],
        ["Be brief.", four],
        ["Be brief.", four, "yes", five],
    ]
    assert len(keys) == len(seen)
    forgotten, refused, again = capsys.readouterr().err.splitlines()
    assert forgotten == again
    assert "its oldest 2 messages are forgotten" in again
    assert "tokens, but the model's positions have room for 59 beside --max-new-tokens 5" in refused


def test_a_long_conversation_is_answered_to_its_end(chatting, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Where does the file go then?\n" * 8))
    assert main(["chat", str(chatting), *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out.count("> ") == 9
    assert "are forgotten" in err


def test_answers_without_room_are_refused_before_the_first_turn(chatting, capsys, monkeypatch):
    monkeypatch.setattr("qlora_jax.cli.writing.load_model", lambda *_, **__: pytest.fail("read"))
    assert main(["chat", str(chatting), *SMALL, "--max-new-tokens", "64"]) == 2
    out, err = capsys.readouterr()
    assert "max_new_tokens=64 leaves no room for a prompt in the model's 64 positions" in err
    assert not out


def test_bad_input_is_refused(folder, capsys):
    assert main(["generate", str(folder), "x", "--top-p", "2"]) == 2
    assert "top_p=2.0 must be above 0" in capsys.readouterr().err
    assert main(["chat", str(folder), *SMALL]) == 2
    assert "template" in capsys.readouterr().err
    assert main(["generate", str(folder), "a " * 70, *SMALL]) == 2
    out, err = capsys.readouterr()
    assert "exceeds the model's 64 positions" in err
    assert not out
    assert main(["generate", str(folder), "x", "--temperature", "nan"]) == 2
    assert "temperature=nan must be a finite number" in capsys.readouterr().err
    for words, message in (
        (["--tempreature", "1", "x"], "unrecognized arguments: --tempreature 1 x"),
        (["--seed", str(2**32)], "is no seed: give one from 0 to 4294967295"),
        (["--seed", "-1"], "-1 is no seed"),
        (["--seed", "x"], "invalid seed value: 'x'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["generate", str(folder), *words])
        assert message in capsys.readouterr().err


def test_what_is_wrong_is_told_before_the_model_is_read(folder, capsys, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("the model was read")

    monkeypatch.setattr("qlora_jax.cli.writing.load_model", fail)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    roberta = tmp_path / "roberta"
    tiny_roberta(roberta)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for model, options, words in (
        (folder, ["a " * 70], "prompt 0 has 72 tokens, and with max_new_tokens=5 exceeds"),
        (folder, ["x", "--max-new-tokens", "64"], "max_new_tokens=64 leaves no room for a prompt"),
        (folder, ["x", "--stop", ""], "stop holds an empty text"),
        (folder, ["x", "--temperature", "1e-50"], "temperature=1e-50 is too near to 0"),
        (folder, ["x", "--blocksize", "32"], "--16-bit is given, but other options ask for"),
        (folder, ["x", "--adapter", str(adapter)], "has no adapter_model.safetensors"),
        (roberta, ["x"], "is a 'roberta', which writes no texts"),
    ):
        assert main(["generate", str(model), *SMALL, *options]) == 2
        assert words in capsys.readouterr().err


def test_every_option_reaches_the_model_and_its_sampling(folder, tmp_path, capsys, monkeypatch):
    lora = LoraConfig(r=2, alpha=4, target_modules=("q_proj",))
    config = config_to_json(lora, base_name="", targets=("q_proj",), task_type="CAUSAL_LM")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora_A.weight": np.zeros((2, 2), np.float32)}, tmp_path / WEIGHTS)
    load_tokenizer(folder).with_tokens(["<|x|>"]).save(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7]}')
    seen = {}
    monkeypatch.setattr(
        "qlora_jax.cli.generate.find_source",
        lambda name, revision: seen.update(revision=revision) or Path(name),
    )
    monkeypatch.setattr(
        "qlora_jax.cli.writing.load_model", lambda _, **options: seen.update(options) or "model"
    )
    monkeypatch.setattr(
        "qlora_jax.cli.writing.load_adapter", lambda *loaded: seen.update(loaded=loaded)
    )

    def write(model, tokenizer, prompts, config, *, key, batch_size):
        seen.update(config=config, key=key, added=tokenizer.token_id("<|x|>"))
        return [SimpleNamespace(text="!") for _ in prompts]

    monkeypatch.setattr("qlora_jax.cli.generate.generate_text", write)
    command = (
        f"generate {folder} A B --adapter {tmp_path} "
        "--revision v1 --dtype float16 --max-new-tokens 5 --temperature 0.5 --top-p 0.75 --top-k 3 "
        "--min-p 0.125 --repetition-penalty 1.5 --seed 9 --quant-type fp4 --blocksize 32 "
        "--no-double-quant --embedding-bits 8 --stop END"
    ).split()
    assert main(command) == 0
    (folder / "generation_config.json").unlink()
    assert capsys.readouterr().out == "A!\n\nB!\n\n"
    assert jax.random.key_data(seen.pop("key")).tolist() == [0, 9]
    assert seen == {
        "revision": "v1",
        "added": 2048,
        "quant": QuantConfig("fp4", 32, False),
        "lora": lora,
        "compute_dtype": np.dtype(np.float16),
        "embedding_bits": 8,
        "loaded": (tmp_path, "model"),
        "config": GenerationConfig(
            max_new_tokens=5,
            temperature=0.5,
            top_k=3,
            top_p=0.75,
            min_p=0.125,
            repetition_penalty=1.5,
            stop=("END",),
            eos_token_ids=(7,),
        ),
    }


def test_a_folder_in_4_bits_is_taken_as_it_is(folder, capsys, tmp_path):
    packed = ["--quant-type", "fp4", "--blocksize", "32", "--no-double-quant"]
    assert main(["quantize", str(folder), str(tmp_path / "fp4"), *packed]) == 0
    options = [option for option in SMALL if option != "--16-bit"]
    capsys.readouterr()
    assert main(["generate", str(folder), "The file", *options, *packed]) == 0
    quantized_here = capsys.readouterr().out
    assert main(["generate", str(tmp_path / "fp4"), "The file", *options]) == 0
    assert capsys.readouterr().out == quantized_here
    assert main(["generate", str(tmp_path / "fp4"), "The file", *options, *packed]) == 0
    assert capsys.readouterr().out == quantized_here
    other = ["--blocksize", "128"]
    assert main(["generate", str(tmp_path / "fp4"), "The file", *options, *other]) == 2
    assert "but other options ask for QuantConfig" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "fp4"), "The file", *SMALL]) == 2
    assert "is quantized already" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_as_a_shell_says_it(folder, capsys, monkeypatch):
    class Interrupted(io.StringIO):
        def read(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert main(["generate", str(folder), *SMALL]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
