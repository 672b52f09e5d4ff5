"""Adapters that PEFT puts around packed experts (`target_parameters`), used here: equal logits."""

import contextlib

import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.checkpoints import (
    load_adapter,
    merged,
    open_checkpoint,
    read_adapter_config,
    save_adapter,
    save_checkpoint,
)
from tests.peers.test_adapters import (
    EXPERTS,
    moved,
    our_logits,
    ours,
    peft,
    peft_adapter,
    same,
    their_logits,
    theirs,
)

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
KINDS = {
    "with attention": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": [GATE_UP, DOWN],
    },
    "alone": {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    "down alone": {"target_modules": ["q_proj"], "target_parameters": [DOWN]},
    "gate and up alone": {"target_modules": ["q_proj"], "target_parameters": [GATE_UP]},
    "rslora": {"target_parameters": [GATE_UP, DOWN], "use_rslora": True},
    "rslora, alphas": {
        "target_parameters": [GATE_UP, DOWN],
        "use_rslora": True,
        "alpha_pattern": {"down_proj": 5},
    },
    "one layer's alpha": {
        "target_parameters": [GATE_UP, DOWN],
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 40},
    },
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {"gate_up_proj": 6, r"layers\.1\.mlp\.experts\.down_proj": 2, "up_proj": 3},
        "alpha_pattern": {"down_proj": 5, r".*\.1\.self_attn\.q_proj": 3},
    },
    "some layers": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", f"model.layers.1.{DOWN}"],
        "layers_to_transform": [0],
        "exclude_modules": ["experts", "down_proj"],
    },
    # PEFT packs them itself, at twice the rank.
    "by their old names": {
        "target_modules": ["q_proj", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"]
    },
}
MISREAD = {"gate and up alone", "one layer's alpha"}
"""What PEFT 0.21.2 packs wrongly out of adapters with a module per expert: gate and up of which no
`down` is adapted, whose factors it looks for one wrapper too deep; and gate and up of another alpha
than `lora_alpha`, which it takes twice for both."""


@pytest.mark.parametrize("name", sorted(EXPERTS))
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_packed_experts_here(kind: str, name: str, vectors, tmp_path) -> None:
    folder = vectors(name)
    base = theirs(folder)
    before = their_logits(base)
    trained = peft_adapter(base, tmp_path / "theirs", r=4, lora_alpha=8, **KINDS[kind])
    expected = their_logits(trained)
    lora = read_adapter_config(tmp_path / "theirs")
    model = ours(folder, lora)
    load_adapter(tmp_path / "theirs", model)
    same(our_logits(model), expected, before)
    wide = merged(open_checkpoint(folder), tmp_path / "theirs", dtype=np.float32)
    save_checkpoint(tmp_path / "merged", wide)
    same(our_logits(ours(tmp_path / "merged", None)), expected, before)

    # Trained on and saved, it has a module per expert, which PEFT packs again.
    save_adapter(tmp_path / "ours", moved(model), lora, str(folder))
    again = ours(folder, read_adapter_config(tmp_path / "ours"))
    load_adapter(tmp_path / "ours", again)
    np.testing.assert_array_equal(our_logits(again), our_logits(model))
    read = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    wrong = pytest.raises(AssertionError, match="Not equal to tolerance")
    with wrong if kind in MISREAD else contextlib.nullcontext():
        same(our_logits(model), their_logits(read), before)


def test_the_router_is_refused(vectors, tmp_path) -> None:
    """PEFT 0.21's "all-linear" adapts it, too."""
    base = theirs(vectors("mixtral"))
    peft_adapter(base, tmp_path, r=4, lora_alpha=8, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"not 'gate\.weight'"):
        ql.read_adapter_config(tmp_path)
