"""Adapters of a classifier and of a sequence-to-sequence model: PEFT and this library give the same
logits, both ways, on a dense base and on one in 4 bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import qlora_jax as ql
from qlora_jax.checkpoints import (
    load_adapter,
    load_model,
    open_checkpoint,
    packable_weights,
    quantized,
    read_adapter_config,
    save_adapter,
    save_checkpoint,
)
from qlora_jax.quant import QuantConfig
from tests.peers.models import our_logits, same, save_random, their_logits, theirs, torch

peft = pytest.importorskip("peft", reason="make test-peers installs it")

TASKS = {
    "roberta": ("SEQ_CLS", "PeftModelForSequenceClassification"),
    "t5 v1.1": ("SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM"),
}
# The base, what is adapted ("dense" is a part of the head's names, too), and whether in 4 bits.
CASES = [
    ("roberta", ("query", "value"), False),
    ("roberta", ("query", "dense"), True),
    ("roberta", "all-linear", False),
    ("t5 v1.1", ("q", "v", "wo"), False),
    ("t5 v1.1", ("q", "v", "wo"), True),
    ("t5 v1.1", "all-linear", True),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(name, in 4 bits or not) → a folder."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for name in TASKS:
        folder = root / name.replace(" ", "-")
        save_random(name, folder)
        dense = open_checkpoint(folder)
        packed = quantized(dense, packable_weights(dense), QuantConfig())
        save_checkpoint(root / f"{folder.name}-nf4", packed)
        found |= {(name, False): folder, (name, True): root / f"{folder.name}-nf4"}
    return found


def ours(folder, lora, in_4_bits: bool):
    quant = QuantConfig() if in_4_bits else None
    return load_model(folder, quant=quant, lora=lora, compute_dtype=jnp.float32)


def moved(model):
    """Random numbers everywhere in what is trained, the head as well."""
    state = nnx.state(model, nnx.LoRAParam)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)]))
    return model


def changed(logits: np.ndarray, base: np.ndarray) -> None:
    assert np.abs(logits - base).max() > 1e-2 * np.ptp(base), "the adapter changes nothing"


def as_if_trained(base, config):
    """The base with PEFT's adapter, moved at random."""
    torch.manual_seed(1)
    trained = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return trained


@pytest.mark.parametrize(("name", "targets", "in_4_bits"), CASES)
def test_ours_in_peft(name, targets, in_4_bits, bases, tmp_path):
    folder = bases[name, in_4_bits]
    lora = ql.LoraConfig(r=4, alpha=8, target_modules=targets)
    model = moved(ours(folder, lora, in_4_bits))
    save_adapter(tmp_path, model, lora, str(folder))
    task, kind = TASKS[name]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task
    assert config["modules_to_save"] == (["classifier"] if name == "roberta" else None)

    base = theirs(folder)
    before = their_logits(base)
    read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert type(read).__name__ == kind
    same(our_logits(model), their_logits(read))
    changed(their_logits(read), before)


@pytest.mark.parametrize(("name", "targets", "in_4_bits"), CASES)
def test_pefts_here(name, targets, in_4_bits, bases, tmp_path):
    folder = bases[name, in_4_bits]
    base = theirs(folder)
    before = their_logits(base)
    named = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=named, task_type=TASKS[name][0])
    trained = as_if_trained(base, config)
    trained.save_pretrained(tmp_path / "theirs")
    lora = read_adapter_config(tmp_path / "theirs")
    model = ours(folder, lora, in_4_bits)
    load_adapter(tmp_path / "theirs", model)
    same(our_logits(model), their_logits(trained))
    changed(their_logits(trained), before)

    # And back: the same tensors by the same names, whatever the configuration says besides.
    save_adapter(tmp_path / "back", model, lora, str(folder))
    back, first = (
        load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("back", "theirs")
    )
    assert back.keys() == first.keys()
    for tensor, value in first.items():
        np.testing.assert_array_equal(back[tensor], value, err_msg=tensor)


def test_pefts_biases_of_the_head(bases, tmp_path):
    """All biases, of which PEFT saves the head's three times, by longer names than elsewhere."""
    folder = bases["roberta", False]
    base = theirs(folder)
    before = their_logits(base)
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    trained = as_if_trained(base, config)
    trained.save_pretrained(tmp_path)
    model = ours(folder, read_adapter_config(tmp_path), False)
    load_adapter(tmp_path, model)
    same(our_logits(model), their_logits(trained))
    changed(their_logits(trained), before)
