"""LoRA+ beside PEFT's optimizer: the same gradients, the same adapters after three steps."""

import numpy as np
import optax
import pytest

from qlora_jax.optim import loraplus

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")
peft = pytest.importorskip("peft", reason="make test-peers installs it")
optimizers = pytest.importorskip("peft.optimizers", reason="make test-peers installs it")


def test_pefts_optimizer(vectors):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(vectors("qwen2"), dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    theirs = optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # A tree with the adapters' own names, as a state of ours has.
    ours = {name: {part(name): p.detach().numpy().copy()} for name, p in trained.items()}
    tx = loraplus(optax.adamw(1e-3, weight_decay=0.1), 16.0)
    state = tx.init(ours)
    ids = torch.tensor([[1, 3, 7, 20, 5, 9]])
    for _ in range(3):
        theirs.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {name: {part(name): p.grad.numpy().copy()} for name, p in trained.items()}
        theirs.step()
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, parameter in trained.items():
        expected = parameter.detach().numpy()
        # optax takes 1 - 0.999^t in float32, which is 6e-5 off, and the root of that.
        np.testing.assert_allclose(ours[name][part(name)], expected, rtol=6e-5, atol=2e-6)
    moved = {name: np.abs(tree["lora_B"]).max() for name, tree in ours.items() if "lora_B" in tree}
    assert min(moved.values()) > 1e-2


def part(name: str) -> str:
    return "lora_B" if "lora_B" in name else "lora_A"
