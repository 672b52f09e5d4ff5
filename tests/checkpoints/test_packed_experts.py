"""Adapters of packed experts as PEFT writes them, made by hand, against NumPy's own deltas.

`tests/peers/test_packed_experts.py` reads files that PEFT itself has written.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import (
    check_adapter,
    load_adapter,
    load_model,
    merge,
    open_checkpoint,
    read_adapter_config,
    save_adapter,
)
from qlora_jax.checkpoints.adapter_file import CONFIG, WEIGHTS
from qlora_jax.checkpoints.adapter_parts import adapted_layers
from qlora_jax.checkpoints.packed_experts import plainly_scaled
from qlora_jax.nn import LoraConfig
from tests.checkpoints.tiny import change_config, write_model
from tests.models.variants import VARIANTS

FAMILIES = {
    "mixtral-window": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "qwen3_moe-normed": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}
BOTH = ["mlp.experts.gate_up_proj", "experts.down_proj"]


class Packed:
    """An adapter in the making: its tensors, and the delta of every layer by its name here."""

    def __init__(self, name: str, *, older: bool = False, **changes: int) -> None:
        self.model = dataclasses.replace(VARIANTS[name], **changes)
        self.mlp, self.gate_up, self.down = FAMILIES[name]
        self.older = older
        self.rng = np.random.default_rng(0)
        self.tensors: dict[str, np.ndarray] = {}
        self.deltas: dict[str, np.ndarray] = {}

    def random(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def add(self, layer: int, parameter: str, r: int, scaling: float, inside: str = "") -> None:
        """PEFT's `ParamWrapper.get_delta_weight`, written as there."""
        experts, outer = self.model.num_local_experts, self.model.hidden_size
        inner = self.model.intermediate_size
        fused = parameter == "gate_up_proj"
        shape = (2 * inner, outer) if fused else (outer, inner)
        outputs, inputs = shape[::-1] if self.older else shape
        a, b = self.random(experts * r, inputs), self.random(outputs, r * experts)
        name = f"base_model.model.model.layers.{layer}.mlp.experts{inside}"
        self.tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        delta = scaling * np.einsum(
            "ore,eri->eio" if self.older else "ore,eri->eoi",
            b.reshape(outputs, r, experts).astype(np.float64),
            a.reshape(experts, r, inputs),
        )
        names = self.gate_up if fused else (self.down,)
        for e, whole in enumerate(delta):
            module = f"model.layers.{layer}.{self.mlp}.experts.{e}"
            for own, part in zip(names, np.split(whole, len(names)), strict=True):
                self.deltas[f"{module}.{own}"] = part

    def add_query(self, layer: int, r: int, scaling: float) -> None:
        heads = self.model.num_attention_heads * self.model.head_dim
        module = f"model.layers.{layer}.self_attn.q_proj"
        a, b = self.random(r, self.model.hidden_size), self.random(heads, r)
        name = f"base_model.model.{module}"
        self.tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        self.deltas[module] = scaling * b.astype(np.float64) @ a

    def write(self, folder: Path, **config) -> None:
        """The base in `folder/base`, the adapter beside it."""
        write_model(folder / "base", self.model)
        save_file(self.tensors, folder / WEIGHTS)
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
        (folder / CONFIG).write_text(json.dumps(fields | config))

    def is_read(self, folder: Path) -> None:
        """Every layer has its delta, in a model and in a merge, and no other has one."""
        lora = read_adapter_config(folder)
        assert lora == check_adapter(folder)
        model = load_model(folder / "base", quant=None, lora=lora, compute_dtype=jnp.float32)
        load_adapter(folder, model)
        assert_deltas(model, self.deltas)
        base = open_checkpoint(folder / "base")
        result = merge(base, folder, "original")
        assert result.tensors.keys() == base.tensors.keys()
        for name in base.tensors:
            before = base.read(name).astype(np.float32)
            expected = before + self.deltas.get(name.removesuffix(".weight"), 0)
            np.testing.assert_allclose(
                result.read(name).astype(np.float32), expected, rtol=1e-5, atol=1e-5, err_msg=name
            )
        # What is saved again is an adapter with a module per expert.
        save_adapter(folder / "again", model, lora, "base")
        names = load_file(folder / "again" / WEIGHTS).keys()
        assert {n.split(".lora_")[0] for n in names} == {
            f"base_model.model.{module}" for module in self.deltas
        }
        again = load_model(
            folder / "base",
            quant=None,
            lora=read_adapter_config(folder / "again"),
            compute_dtype=jnp.float32,
        )
        load_adapter(folder / "again", again)
        assert_deltas(again, self.deltas)


def assert_deltas(model, deltas: dict[str, np.ndarray]) -> None:
    found = {}
    for adapted in adapted_layers(model):
        a, b = (
            np.asarray(x[...], np.float64) for x in (adapted.layer.lora_A, adapted.layer.lora_B)
        )
        for number, module in enumerate(adapted.modules):
            place = adapted.place(number)
            found[module] = adapted.scaling(number) * b[place] @ a[place]
    for module, delta in found.items():
        expected = deltas.get(module, np.zeros_like(delta))
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5, err_msg=module)
    assert deltas.keys() <= found.keys()


@pytest.mark.parametrize("older", [False, True], ids=["", "before 0.19.1"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_has_its_own_factors(name: str, older: bool, tmp_path: Path) -> None:
    packed = Packed(name, older=older)
    for layer in range(packed.model.num_hidden_layers):
        packed.add_query(layer, 2, 3)
        packed.add(layer, "gate_up_proj", 2, 3, ".base_layer")
        packed.add(layer, "down_proj", 2, 3)
    # Of older files the shapes tell.
    packed.write(tmp_path, target_parameters=BOTH)
    packed.is_read(tmp_path)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_parameter_alone_with_rslora(name: str, parameter: str, tmp_path: Path) -> None:
    """Nothing is nested then; `target_modules` may be empty."""
    packed = Packed(name)
    for layer in range(packed.model.num_hidden_layers):
        packed.add(layer, parameter, 2, 6 / 2**0.5)
    packed.write(tmp_path, target_parameters=[parameter], target_modules=[], use_rslora=True, r=2)
    packed.is_read(tmp_path)


def test_rslora_of_experts_is_written_as_larger_alphas() -> None:
    """Every module keeps its scale; without experts nothing changes."""
    ranks, alphas = {"q_proj": 3}, {"1.w1": 5}
    lora = LoraConfig(r=8, alpha=6, use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    ends = ("self_attn.q_proj", "block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.1.w1")
    modules = [f"model.layers.0.{end}" for end in ends]
    plain = plainly_scaled(lora, modules)
    assert not plain.use_rslora
    for module in modules:
        own, before = plain.at(module), lora.at(module)
        assert own is not None
        assert before is not None
        assert own.r == before.r
        assert own.scaling == pytest.approx(before.scaling, rel=1e-15)
    assert plainly_scaled(lora, modules[:1]) == lora
    # Where the experts agree, PEFT finds the alpha by the packed name, too.
    modules = [f"model.layers.0.block_sparse_moe.experts.{n}.w2" for n in range(2)]
    packed = plainly_scaled(dataclasses.replace(lora, alpha_pattern={"w2": 5}), modules)
    (pattern,) = packed.alpha_pattern
    assert re.fullmatch(pattern, "model.layers.0.mlp.experts.down_proj")
    assert not re.fullmatch(pattern, "model.layers.1.mlp.experts.down_proj")


@pytest.mark.parametrize("name", FAMILIES)
def test_patterns_and_layers_mean_what_they_mean_in_peft(name: str, tmp_path: Path) -> None:
    """Patterns are held against the packed names; what chooses modules chooses no parameters."""
    packed = Packed(name)
    packed.add_query(1, 2, 3)
    for layer in range(packed.model.num_hidden_layers):
        packed.add(layer, "gate_up_proj", 4, 3 / 2, ".base_layer" if layer == 2 else "")
    packed.add(2, "down_proj", 3, 5 / 3)
    packed.write(
        tmp_path,
        target_parameters=["gate_up_proj", "2.mlp.experts.down_proj"],
        layers_to_transform=[1],
        exclude_modules=["experts", "down_proj", "w2"],
        rank_pattern={"up_proj": 7, r".*\.gate_up_proj": 4, r"mlp\.experts\.down_proj": 3},
        alpha_pattern={"w1": 9, r"layers\.2\..*down_proj": 5},
    )
    packed.is_read(tmp_path)


@pytest.mark.parametrize("version", [None, "0.19.0", "0.19.1", "0.21.2"])
def test_where_shapes_do_not_tell_the_layout_the_version_does(version, tmp_path: Path) -> None:
    older = version in (None, "0.19.0")
    packed = Packed("mixtral-window", older=older, intermediate_size=32)
    for layer in range(packed.model.num_hidden_layers):
        packed.add(layer, "down_proj", 2, 3)
    packed.write(
        tmp_path, target_parameters=["experts.down_proj"], target_modules=None, peft_version=version
    )
    packed.is_read(tmp_path)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    packed = Packed("mixtral-window")
    for layer in range(packed.model.num_hidden_layers):
        packed.add_query(layer, 2, 3)
        packed.add(layer, "down_proj", 2, 3)
    packed.write(tmp_path, target_parameters=["experts.down_proj"])
    return tmp_path


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            ["experts.down_proj", "mlp.gate.weight"],
            "only the experts'.*not 'mlp.gate.weight'.*PEFT",
        ),
        (["q_proj.weight"], "not 'q_proj.weight'"),
        (["feed_forward.experts.down_proj"], "not 'feed_forward.experts.down_proj'"),
        ("experts.down_proj", "target_parameters .*, but a list of names"),
        ([1], "target_parameters .*, but a list of names"),
    ],
)
def test_parameters_that_are_no_experts_are_refused(targets, words: str, written: Path) -> None:
    change_config(written, file=CONFIG, target_parameters=targets)
    for read in (read_adapter_config, check_adapter):
        with pytest.raises(ValueError, match=words):
            read(written)
    with pytest.raises(ValueError, match=words):
        merge(open_checkpoint(written / "base"), written, "original")


def test_without_its_tensors_the_layers_are_unknown(written: Path) -> None:
    (written / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"the tensors tell, but {WEIGHTS} is not beside"):
        read_adapter_config(written)
    (written / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is not beside it; adapter_model.bin"):
        read_adapter_config(written)


def test_a_pattern_that_no_path_can_be_held_against_is_refused(written: Path) -> None:
    change_config(written, file=CONFIG, rank_pattern={"(?i)down_proj": 2})
    with pytest.raises(ValueError, match=r"rank_pattern .*, but names with whole numbers"):
        read_adapter_config(written)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 3}, r"shape \[6, 48\] .* 3 experts of rank 3 in this base need \[9, 48\]"),
        ({"target_parameters": ["gate_up_proj"]}, r"need \[6, 32\] and \[96, 6\]: the adapter was"),
        ({"target_parameters": ["7.mlp.experts.down_proj"]}, "(does not adapt|does not have)"),
        ({"target_parameters": BOTH}, "(lacks .*w1|not target)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, words: str, written: Path) -> None:
    change_config(written, file=CONFIG, **change)
    base = written / "base"
    model = load_model(base, quant=None, lora=read_adapter_config(written))
    with pytest.raises(ValueError, match=words):
        load_adapter(written, model)
    with pytest.raises(ValueError, match=words):
        merge(open_checkpoint(base), written, "original")


def test_a_base_without_experts_is_refused(written: Path) -> None:
    base = written / "llama"
    write_model(base)
    model = load_model(base, quant=None, lora=read_adapter_config(written))
    with pytest.raises(ValueError, match=r"mlp\.experts.* that the model does not adapt"):
        load_adapter(written, model)
    with pytest.raises(ValueError, match="does not have: the adapter was trained on another"):
        merge(open_checkpoint(base), written, "original")
