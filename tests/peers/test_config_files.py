"""config.json files as people write them, read by transformers itself and here: the same logits.

`test_families.py` begins with our own config.json; here the file is the older style's, or says a
thing twice.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import load_model
from tests.peers.models import SEEING, TINY, our_logits, save_random, their_logits, theirs
from tests.peers.models import same as same_logits
from tests.vectors.qlora_run import logits

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"type": "longrope", "short_factor": [1, 1.1, 1.2, 1.3], "long_factor": [1, 2, 3, 4]}
IDS = np.random.default_rng(0).integers(3, 44, (2, 40)).astype(np.int32)

FILES = {
    "llama, a length outside": {"rope_scaling": _LLAMA3, "original_max_position_embeddings": 16},
    "llama, two lengths": {"rope_scaling": _YARN, "original_max_position_embeddings": 2048},
    "phi3, a length of its class": {"rope_scaling": _LONG, "max_position_embeddings": 8192},
    # To transformers 5 a Ministral.
    "mistral, windows in some layers": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "phi3, a window": {"sliding_window": 6, "partial_rotary_factor": 0.5},
    "gpt_neox, names of others": {"rope_theta": 500.0, "partial_rotary_factor": 0.75},
    "gemma3, a head of its own": SEEING | {"tie_word_embeddings": False},
    "gemma3, a cap": SEEING
    | {"text_config": SEEING["text_config"] | {"final_logit_softcapping": 1.0}},
    "gemma3, a text with a head": SEEING
    | {"text_config": SEEING["text_config"] | {"tie_word_embeddings": False}},
}


def random_peer(folder, given):
    """A model of the file, in the folder, with tensors that transformers saved there."""
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(json.dumps(given))
    torch.manual_seed(0)
    seeing = given["model_type"] == "gemma3"
    auto = transformers.AutoModelForImageTextToText if seeing else transformers.AutoModelForCausalLM
    made = auto.from_config(transformers.AutoConfig.from_pretrained(folder)).float().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    made.save_pretrained(folder)
    config.write_text(json.dumps(given))
    return made


def same(folder, peer) -> None:
    with torch.no_grad():
        expected = peer(input_ids=torch.from_numpy(IDS).long()).logits.numpy()
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    error = np.abs(np.asarray(logits(model, IDS, None)) - expected).max()
    assert error < 2e-6 * np.ptp(expected), error / np.ptp(expected)


@pytest.mark.parametrize("name", FILES)
def test_the_same_logits(name, tmp_path):
    given = TINY | FILES[name] | {"model_type": name.partition(",")[0]}
    same(tmp_path / "model", random_peer(tmp_path / "model", given))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_a_tied_head_of_other_numbers(model_type, tmp_path):
    """The file ties, and holds both: transformers takes both."""
    folder = tmp_path / "model"
    given = TINY | {"model_type": model_type, "head_dim": 8, "tie_word_embeddings": False}
    random_peer(folder, given)
    (folder / "config.json").write_text(json.dumps(given | {"tie_word_embeddings": True}))
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    assert peer.get_output_embeddings().weight is not peer.get_input_embeddings().weight
    same(folder, peer)


def test_a_t5s_tied_head_of_other_numbers(tmp_path):
    """Tied means scaled, too: the head is its own, and is scaled all the same."""
    save_random("t5 v1.0", tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    head = {"lm_head.weight": -tensors["shared.weight"]}
    save_file(tensors | head, weights, metadata={"format": "pt"})
    model = load_model(tmp_path, quant=None, lora=None, compute_dtype=jnp.float32)
    same_logits(our_logits(model), their_logits(theirs(tmp_path)))
