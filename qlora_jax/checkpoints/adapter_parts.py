"""What a model has trained, by PEFT's names: adapters, and what of the base is trained whole.

A stack of layers is one array here and one tensor per layer there; where the layers' ranks differ,
what fills the smaller ones up is left out.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.checkpoints.adapter_file import TOKENS
from qlora_jax.checkpoints.matching import node_at
from qlora_jax.models import FAMILIES, module_names, vocabularies
from qlora_jax.nn import LoraConfig, QuantDense, TrainedParam
from qlora_jax.nn.targets import ALL_LINEAR, ALSO_CALLED
from qlora_jax.processes import distribute, whole


class Part(NamedTuple):
    """One tensor of the adapter, and the place in the model that holds it.

    Attributes:
        names: what PEFT calls it (without its prefix); the first is what we write, any is read.
        variable: the array, of a whole stack.
        place: index of the layer in the stack; () where there is none.
        axis: along which only the first `length` entries are the adapter's; None for all.
        length: the layer's rank.
    """

    names: tuple[str, ...]
    variable: nnx.Variable
    place: tuple[int, ...] = ()
    axis: int | None = None
    length: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        shape = list(self.variable.get_value().shape[len(self.place) :])
        if self.axis is not None:
            shape[self.axis] = self.length
        return tuple(shape)

    def taken(self, array: np.ndarray) -> np.ndarray:
        """The tensor, out of all of the variable's array."""
        array = array[self.place]
        if self.axis is not None:
            array = array.take(range(self.length), axis=self.axis)
        return np.ascontiguousarray(array)


class Adapted(NamedTuple):
    """One adapted linear layer of the tree, or a stack of them.

    Attributes:
        path: in the tree.
        layer: the module.
        modules: its Hugging Face names, one for each layer of the stack.
    """

    path: str
    layer: QuantDense
    modules: list[str]

    def place(self, number: int) -> tuple[int, ...]:
        """Where the layer of a number lies along the stack's axes."""
        return tuple(map(int, np.unravel_index(number, self.layer.stack_shape)))

    def scaling(self, number: int) -> float:
        """What the adapter of one layer is scaled by; 0 where it has none."""
        assert self.layer.lora is not None
        if self.layer.lora_scaling is None:
            return self.layer.lora.scaling
        return float(self.layer.lora_scaling.get_value()[self.place(number)])


def adapted_layers(model: Any) -> Iterator[Adapted]:
    """The adapted linear layers of a model, stacks as one."""
    tensors = FAMILIES[model.config.model_type].weight_names(model.config)
    kernels = {name: slot for name, slot in tensors.items() if slot.path[-1] == "kernel"}
    for path, modules in module_names(kernels).items():
        layer = node_at(model, tuple(path.split(".")))
        if isinstance(layer, QuantDense) and layer.lora is not None:
            yield Adapted(path, layer, modules)


def trained_parts(model: Any, lora: LoraConfig) -> Iterator[Part]:
    """Every tensor of an adapter with this configuration."""
    biases = set()
    for adapted in adapted_layers(model):
        layer = adapted.layer
        for number, module in enumerate(adapted.modules):
            own, place = lora.at(module), adapted.place(number)
            if own is None:
                continue
            biases.add(f"{module}.bias")
            assert layer.lora_A is not None
            assert layer.lora_B is not None
            yield Part((f"{module}.lora_A.weight",), layer.lora_A, place, 0, own.r)
            yield Part((f"{module}.lora_B.weight",), layer.lora_B, place, 1, own.r)
            if layer.lora_magnitude_vector is not None:
                name = f"{module}.lora_magnitude_vector"
                yield Part((name, f"{name}.weight"), layer.lora_magnitude_vector, place)
    for name, slot in FAMILIES[model.config.model_type].weight_names(model.config).items():
        variable = node_at(model, slot.path)
        if not isinstance(variable, TrainedParam):
            continue
        others = ALSO_CALLED.get(name.removesuffix(".weight"), ())
        names = (name, *(f"{module}.weight" for module in others))
        if name in biases:
            # Where PEFT has put an adapter around the layer; older versions left the name alone.
            names = (f"{name.removesuffix('bias')}base_layer.bias", name)
        yield Part(names, variable, slot.stack_index)
    for module, embedding in token_modules(model).items():
        if embedding.token_rows is not None:
            yield Part((f"{module}.{TOKENS}",), embedding.token_rows)


def token_modules(model: Any) -> dict[str, Any]:
    """The matrices with a row for each token, by their Hugging Face names."""
    names = module_names(FAMILIES[model.config.model_type].weight_names(model.config))
    return {names[path][0]: embedding for path, embedding in vocabularies(model).items()}


def adapted_modules(model: Any, lora: LoraConfig) -> list[str]:
    """The linear layers of the model that a configuration means, by their Hugging Face names."""
    return [
        module
        for layers in adapted_layers(model)
        for module in layers.modules
        if lora.at(module) is not None
    ]


def base_tensors(model: Any) -> Iterator[tuple[str, nnx.Variable]]:
    """The base's tensors by name, and the Variable that holds each (of a stack, the whole)."""
    for name, slot in FAMILIES[model.config.model_type].weight_names(model.config).items():
        yield name, node_at(model, slot.path)


def check_vocabulary(model: Any, lora: LoraConfig | None) -> None:
    """Refuses adapters of the embedding or the head, and to train a head whole that is the
    embedding, which is not to be trained.

    Raises:
        ValueError: `target_modules` names one, or `modules_to_save` such a head alone.
    """
    if lora is None:
        return
    embeddings, output = list(token_modules(model)), FAMILIES[model.config.model_type].output
    for module in (*embeddings, *([] if output is None else [output])):
        called = (module, *ALSO_CALLED.get(module, ()))
        if lora.target_modules != ALL_LINEAR and any(map(lora.targets, called)):
            name = module.rpartition(".")[2]
            raise ValueError(
                f"target_modules is {lora.target_modules!r}, which means {name!r}, but linear "
                "layers between the embedding and the head alone take adapters here: name it in "
                "modules_to_save instead, to train it whole (a PEFT adapter that has one can be "
                "merged, with `qlora-jax merge --no-report`)."
            )
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    if lora.saves("lm_head") and not any(map(lora.saves, embeddings)):
        raise ValueError(
            f"modules_to_save is {lora.modules_to_save!r}, but this model's head is its embedding: "
            f"name {embeddings[0].rpartition('.')[2]!r} instead, and both are trained."
        )


def put(parts: list[tuple[Part, np.ndarray]]) -> None:
    """Writes tensors into their places; one transfer for each array of the model."""
    arrays: dict[int, tuple[nnx.Variable, np.ndarray]] = {}
    for part, tensor in parts:
        if id(part.variable) not in arrays:
            value = np.array(whole(part.variable.get_value()))
            # What fills a smaller rank up has to be zero; what no tensor is for stays.
            arrays[id(part.variable)] = (
                part.variable,
                value if part.axis is None else np.zeros_like(value),
            )
        room = arrays[id(part.variable)][1][part.place or ...]
        if part.axis == 0:
            room = room[: part.length]
        elif part.axis == 1:
            room = room[:, : part.length]
        room[...] = tensor
    for variable, array in arrays.values():
        sharding = variable.get_value().sharding
        is_spread = isinstance(sharding, jax.sharding.NamedSharding)
        variable.set_value(distribute(array, sharding) if is_spread else jnp.asarray(array))
