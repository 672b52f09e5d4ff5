"""Variants of every decoder family, in transformers itself: our config.json, its random weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints import load_model
from qlora_jax.generate import GenerationConfig, generate
from qlora_jax.models import FAMILIES
from tests.models.variants import VARIANTS
from tests.vectors.qlora_run import logits

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")
pytestmark = pytest.mark.filterwarnings("default")

LENGTH = 14


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_our_config_and_gives_the_same_logits(name, tmp_path):
    config = VARIANTS[name]
    family = FAMILIES[config.model_type]
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(family.write_config(config)))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(ours), attn_implementation="eager"
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert family.read_config(saved) == config

    model = load_model(tmp_path / "theirs", quant=None, lora=None, compute_dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (2, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0))
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask),
            position_ids=positions,
        ).logits.numpy()
    real = mask.astype(bool)
    error = np.abs(np.asarray(logits(model, ids, mask)) - expected)[real].max()
    assert error < 2e-6 * np.ptp(expected[real]), error / np.ptp(expected[real])


@pytest.mark.parametrize("name", ["bloom-even", "bloom-six"])
def test_transformers_writes_the_same_texts(name, vectors):
    """Those of a BLOOM, whose biases grow with the cache; padded on the left."""
    folder = vectors(name)
    prompts = [[5, 6, 7, 8, 9], [3, 4]]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        written = theirs.generate(ids, attention_mask=(ids > 0).long(), **options)
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    ours = generate(model, prompts, GenerationConfig(max_new_tokens=12, temperature=0.0))
    assert [list(one.tokens) for one in ours] == written[:, 5:].tolist()


def test_transformers_repeats_itself_as_little(vectors):
    folder = vectors("bloom-even")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    options = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    prompts, texts = [[5, 6, 7, 8, 9], [3, 4]], []
    for prompt in prompts:
        with torch.no_grad():
            # Alone: in a batch it penalizes the padding, too.
            text = theirs.generate(
                torch.tensor([prompt]), do_sample=False, eos_token_id=None, **options
            )
        texts.append(text[0, len(prompt) :].tolist())
    ours = generate(model, prompts, GenerationConfig(**options))
    assert [list(one.tokens) for one in ours] == texts
    plain = generate(model, prompts, GenerationConfig(max_new_tokens=12))
    assert [one.tokens for one in ours] != [one.tokens for one in plain]
