import subprocess
import sys
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import errors

import qlora_jax as ql
from experiments.embedded import MODELS
from qlora_jax import pretrained
from qlora_jax.checkpoints import load_model
from qlora_jax.pretrained import find_folder, load_pretrained
from tests.shared import shared_path


def hub_error(kind: type[Exception]) -> Exception:
    """Without the response it would carry, whose type differs between versions of the library."""
    error = kind.__new__(kind)
    error.args = ("refused",)
    return error


def test_model_and_tokenizer_of_a_folder():
    folder = shared_path("data/models/stories260K")
    model, tokenizer = load_pretrained(folder, compute_dtype=jnp.float32, remat="none")
    assert model.remat == "none"
    ids = jnp.asarray([tokenizer.encode("Once upon a time")])
    best = int(model(ids)[0, -1].argmax())
    assert tokenizer.decode([*map(int, ids[0]), best]).startswith("Once upon a time,")


def test_a_saved_model_loads_with_its_tokenizer(tmp_path):
    model, tokenizer = ql.load_pretrained(MODELS["stdlib-1m"], lora=None)
    ql.save_model(tmp_path, model, tokenizer=tokenizer)
    again, its = ql.load_pretrained(tmp_path, lora=None)
    assert its.encode("def f(x):") == tokenizer.encode("def f(x):")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_every_public_name_is_there():
    code = (
        "import sys, qlora_jax as ql; assert 'qlora_jax.train' not in sys.modules; "
        "assert [getattr(ql, name) for name in dir(ql)]; from qlora_jax import *; "
        "assert fit is ql.fit and plan.plan and ql.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(ql, "train_model")


@pytest.mark.parametrize(
    ("given", "raised", "message"),
    [
        (hub_error(errors.GatedRepoError), PermissionError, "behind a licence: accept it"),
        (hub_error(errors.RepositoryNotFoundError), FileNotFoundError, "check the spelling"),
        (hub_error(errors.RevisionNotFoundError), FileNotFoundError, "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("offline"), ConnectionError, "cannot be reached"),
        (hub_error(errors.HfHubHTTPError), ConnectionError, "did not give 'org/name'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_hub_answers_in_plain_words(given, raised, message, monkeypatch):
    def fail(*_, **__):
        raise given

    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    with pytest.raises(raised, match=message):
        find_folder("org/name", revision="v9")


def test_only_harmless_files_are_fetched(monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return "/cache/snapshot"

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    assert find_folder("org/name", revision="v1") == Path("/cache/snapshot")
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    fetched = {
        name
        for name in [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer.model",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "modeling_llama.py",
            "tokenizer.py",
            "model.pt",
        ]
        if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    }
    assert fetched == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    }


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("load_in_4bit", r", but quant=QuantConfig\(\):"),
        ("adapter", ", but lora=read_adapter_config"),
        ("rematt", ", but remat=:"),
        ("zzz", ": give some of .*, remat, "),
        ("source", ":"),
    ],
)
def test_an_option_that_it_has_not_is_told_from_those_it_has(option, meant):
    with pytest.raises(TypeError, match=f"load_pretrained has no option '{option}'{meant}"):
        load_pretrained("absent", **{option: True})


def test_its_signature_tells_every_option():
    own, passed_on = (signature(f).parameters for f in (load_pretrained, load_model))
    assert own.keys() == (passed_on.keys() - {"source"}) | {"name_or_folder", "revision"}
    assert all(own[name] == passed_on[name] for name in own.keys() & passed_on.keys())


def test_neither_folder_nor_hub_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a hub name"):
        find_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a local folder, which has none"):
        find_folder(tmp_path, revision="main")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(NotADirectoryError, match=r"is a file, .*export \S*m\.gguf FOLDER"):
        find_folder(tmp_path / "m.gguf")
