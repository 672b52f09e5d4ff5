"""What a PEFT adapter makes of each tensor of its base: the sums of a merge, one tensor at a time,
which `merge.py` lays over a checkpoint.
"""

import functools
from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.adapter_config import CONFIG, config_from_json, read_config_json
from qlora_jax.checkpoints.adapter_file import (
    PREFIX,
    TOKENS,
    UNUSED,
    WEIGHTS,
    check_copies,
    check_head_rows,
    open_weights,
    token_indices,
    without_copy,
)
from qlora_jax.checkpoints.checkpoint import Checkpoint, TensorInfo
from qlora_jax.checkpoints.matching import linear_weights, names_in, ties, untied
from qlora_jax.checkpoints.packed_experts import Cut, expert_cuts
from qlora_jax.checkpoints.tensor_file import TensorFile
from qlora_jax.checkpoints.text_part import text_name
from qlora_jax.models import family_of
from qlora_jax.nn.targets import ALSO_CALLED

_HEAD = "lm_head.weight"
# How PEFT ends the name of each part of a module's adapter.
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


def _names(name: str) -> list[str]:
    """The names that a tensor of an adapter's may have in files."""
    module = name.removesuffix(".weight")
    files = [file for file, others in ALSO_CALLED.items() if module in others]
    return [name, *(f"{file}.weight" for file in files)]


class AdapterFile:
    """A PEFT adapter beside the checkpoint it is for: every name and shape is compared at once,
    numbers are read when they are asked for.

    Attributes:
        adapted: base tensors with a low-rank adapter.
        replaced: base tensors that the adapter brings whole (`modules_to_save`), with the shapes
            that they have there.
        added: such tensors that the base lacks (the head of a model that tied it).
        grown: embeddings and heads with trained rows, or with new ones, and the shapes they take.
        config: the base's config.json, with what the adapter changes in it.
    """

    def __init__(self, folder: str | Path, base: Checkpoint) -> None:
        """Opens the adapter; raises as `merge.merged`."""
        config = read_config_json(folder)
        self._lora = config_from_json(config, Path(folder) / CONFIG)
        self._path = Path(folder) / WEIGHTS
        self._file = TensorFile(self._path)
        # Each of an expert's tensors is a part of one of its layer's four.
        self._packed = functools.lru_cache(maxsize=4)(self._file.read)
        self._keys: dict[str, dict[str, str]] = {}
        self._cuts: dict[str, Cut] = {}
        self.adapted: set[str] = set()
        self.replaced: dict[str, tuple[int, ...]] = {}
        self.added: dict[str, TensorInfo] = {}
        self.grown: dict[str, tuple[int, ...]] = {}
        self._rows: dict[str, tuple[str, np.ndarray]] = {}
        self.config = dict(base.config)
        with open_weights(Path(folder)) as file:
            shapes = {
                key: tuple(file.get_slice(key).get_shape())
                for key in file.keys()  # noqa: SIM118
            }
        shapes = self._with_experts_apart(shapes, base, config.get("peft_version"))
        family = family_of(base.config)
        model_config = family.for_weights(family.read_config(base.config), base.tensors)
        modules = (name.removesuffix(".weight") for name in family.weight_names(model_config))
        check_head_rows(folder, shapes, modules)
        check_copies(folder, shapes)
        self._tokens = token_indices(config, shapes)
        self._called = names_in(base.config)
        for key, shape in shapes.items():
            if UNUSED not in key:
                self._place(key, shape, base)
        self._check(shapes, base)
        self._grow_vocabulary(base)

    def _with_experts_apart(
        self, shapes: dict[str, tuple[int, ...]], base: Checkpoint, version: str | None
    ) -> dict[str, tuple[int, ...]]:
        """Finds where each expert's tensors lie in packed ones, `_cuts`; gives the shapes of
        tensors by name, those of packed experts as each expert's own."""
        keys = {key.removeprefix(PREFIX): key for key in shapes}
        plain = {name: shapes[key] for name, key in keys.items()}
        model = family_of(base.config).read_config(base.config)
        cuts = expert_cuts(self._path.parent, plain, self._lora, model, version)
        self._cuts = {PREFIX + n: cut._replace(name=keys[cut.name]) for n, cut in cuts.items()}
        packed = {cut.name for cut in self._cuts.values()}
        own = {
            key: cut.of(np.broadcast_to(np.float32(0), shapes[cut.name])).shape
            for key, cut in self._cuts.items()
        }
        return {key: shape for key, shape in shapes.items() if key not in packed} | own

    def _place(self, key: str, shape: tuple[int, ...], base: Checkpoint) -> None:
        """Finds the base tensor that one of the adapter's belongs to."""
        name = text_name(key.removeprefix(PREFIX))
        if name.endswith(f".{TOKENS}"):
            module = name.removesuffix(f".{TOKENS}")
            ids = self._tokens.get(module, ())
            if len(ids) != shape[0]:
                raise ValueError(
                    f"{self._path} holds {shape[0]} rows of trained tokens of {module!r}, but its "
                    f"adapter_config.json names {len(ids)}: fetch both again, of one revision."
                )
            self._rows[f"{module}.weight"] = (key, np.asarray(ids))
            return
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
        part = "whole" if suffix is None else _PARTS[suffix]
        if suffix is not None:
            name = name.removesuffix(suffix) + ".weight"
            name = self._called.get(name, name)
            self.adapted.add(name)
        else:
            name = without_copy(name.replace(".base_layer.", "."))
            name = self._called.get(name, name)
            name = next((n for n in _names(name) if n in base.tensors), name)
            self.replaced[name] = shape
            if name not in base.tensors and ties(self.config):
                self.config = untied(self.config)
                self.added[name] = TensorInfo(shape, next(iter(base.tensors.values())).dtype)
        if name not in base.tensors and name not in self.added:
            raise ValueError(
                f"{self._path} adapts {name!r}, which {base.source} does not have: the adapter was "
                "trained on another base model."
            )
        copy = self._keys.setdefault(name, {}).setdefault(part, key)
        apart = copy != key and part == "whole"
        if apart and not np.array_equal(self._file.read(copy), self._file.read(key)):
            raise ValueError(
                f"{self._path} has trained {copy!r} and {key!r} apart, which are one matrix in the "
                "base: use the adapter in PEFT."
            )

    def _check(self, shapes: dict[str, tuple[int, ...]], base: Checkpoint) -> None:
        for name in self.adapted:
            keys = self._keys[name]
            if not {"A", "B"} <= keys.keys() or self._lora.use_dora != ("magnitude" in keys):
                raise ValueError(
                    f"{self._path} holds only {', '.join(sorted(keys))} of {name!r}'s adapter: "
                    "fetch it again, whole."
                )
            if self._lora.at(name.removesuffix(".weight")) is None:
                raise ValueError(
                    f"{self._path} adapts {name!r}, which its adapter_config.json does not target: "
                    "fetch both again, of one revision."
                )
            (rank, inputs), (outputs, _) = shapes[keys["A"]], shapes[keys["B"]]
            if shapes[keys["B"]][1] != rank:
                raise ValueError(
                    f"{self._path} holds {name!r}'s A with rank {rank} and its B with rank "
                    f"{shapes[keys['B']][1]}: fetch it again, whole."
                )
            # PEFT saves a head whole beside its factors: what they were trained on.
            own = self.replaced.get(name) or base.tensors[name].shape
            if own != (outputs, inputs):
                raise ValueError(
                    f"{self._path} adapts {name!r} as {[outputs, inputs]}, but in {base.source} it "
                    f"is {list(own)}: the adapter was trained on another base model."
                )
        linear = linear_weights(base) & base.tensors.keys()
        targeted = {name for name in linear if self._lora.targets(name.removesuffix(".weight"))}
        lacking = sorted(targeted - self.adapted)
        if lacking:
            raise ValueError(
                f"{self._path} lacks the adapter of {lacking[0]!r} (and {len(lacking) - 1} more), "
                "which its adapter_config.json targets: fetch both again, of one revision."
            )
        for name, shape in self.replaced.items():
            if name in self.added:
                continue
            own = base.tensors[name].shape
            if shape[1:] != own[1:] or (shape != own and own[0] != base.config.get("vocab_size")):
                raise ValueError(
                    f"{self._path} replaces {name!r} by {list(shape)}, but in {base.source} it is "
                    f"{list(own)}: the adapter was trained on another base model."
                )
            if shape != own:
                self.config["vocab_size"] = shape[0]

    def _grow_vocabulary(self, base: Checkpoint) -> None:
        if not self._rows:
            return
        size = max(
            base.config["vocab_size"], *(int(ids.max()) + 1 for _, ids in self._rows.values())
        )
        # A head of its own keeps up with the embedding, whether or not its rows are trained.
        for name in {*self._rows, *_names(_HEAD)} & base.tensors.keys():
            self.grown[name] = (size, *base.tensors[name].shape[1:])
        absent = sorted(self._rows.keys() - self.grown.keys())
        if absent:
            raise ValueError(
                f"{self._path} trains rows of {absent[0]!r}, which {base.source} does not have: "
                "the adapter was trained on another base model."
            )
        self.config["vocab_size"] = size

    def grow(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The matrix [rows, embed], float32, with its trained rows, and the mean in new ones."""
        more = self.grown[name][0] - weight.shape[0]
        if more > 0:
            mean = weight.mean(axis=0, dtype=np.float64).astype(np.float32)
            weight = np.concatenate([weight, np.broadcast_to(mean, (more, mean.size))])
        if name in self._rows:
            key, ids = self._rows[name]
            weight[ids] = self._file.read(key).astype(np.float32)
        return weight

    def _read(self, name: str, part: str) -> np.ndarray:
        key = self._keys[name][part]
        cut = self._cuts.get(key)
        return self._file.read(key) if cut is None else cut.of(self._packed(cut.name))

    def replacement(self, name: str) -> np.ndarray:
        """The tensor that takes a base tensor's place."""
        return self._read(name, "whole")

    def merge(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The weight [out, in], float32, with its adapter added."""
        a, b = (self._read(name, part).astype(np.float32) for part in "AB")
        own = self._lora.at(name.removesuffix(".weight")) or self._lora
        weight = weight + np.float32(own.scaling) * (b @ a)
        if "magnitude" in self._keys[name]:
            magnitude = self._read(name, "magnitude").astype(np.float32).reshape(-1)
            length = np.linalg.norm(weight, axis=1)
            weight = weight * (magnitude / np.where(length > 0, length, 1))[:, None]
        return weight
