"""4-bit weights as bitsandbytes stores them, both ways, never dequantized on the way.

A weight `X` takes several tensors of a checkpoint:

    X                                 codes, uint8 [(n + 1) // 2, 1], high nibble first
    X.absmax                          uint8 codes with double quantization, else float32
    X.quant_map                       the code table, float32 [16]
    X.nested_absmax, X.nested_quant_map   with double quantization: float32
    X.quant_state.bitsandbytes__nf4   UTF-8 JSON: quant_type, blocksize, shape, nested_offset, ...

and config.json has a `quantization_config`. Our `QuantizedTensor` holds the same bytes; only their
shape differs.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCKSIZE
from qlora_jax.checkpoints.checkpoint import DTYPES, dtype_name
from qlora_jax.checkpoints.folder import WeightFolder
from qlora_jax.quant import QuantConfig, QuantizedTensor
from qlora_jax.quant.tensor import codes_shape

_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"
# What `quant_storage` may have written codes as.
_ITEM_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
QUANT_TYPES = ("nf4", "fp4")
"""What bitsandbytes has a 4-bit format for."""


class PackedState(NamedTuple):
    """What a weight's JSON says about its bytes."""

    config: QuantConfig
    shape: tuple[int, ...]
    dtype: str
    offset: float | None


def is_part(name: str) -> bool:
    """Whether a tensor belongs to a 4-bit weight of another name."""
    return name.endswith(_PARTS) or _STATE in name


def packed_names(weights: WeightFolder) -> set[str]:
    """The weights of a folder that are stored in 4 bits."""
    return {name.partition(_STATE)[0] for name in weights if _STATE in name}


def read_state(weights: WeightFolder, name: str) -> PackedState:
    """The description of a 4-bit weight: small, read before anything heavy.

    Raises:
        ValueError: one of its parts is missing, or not as large as its shape calls for; or its
            data type or code tables are not bitsandbytes' own.
    """
    blob = next(
        (f"{name}{_STATE}{t}" for t in QUANT_TYPES if f"{name}{_STATE}{t}" in weights), None
    )
    if blob is None:
        strange = next(key for key in weights if key.startswith(name + _STATE))
        raise ValueError(
            f"{weights.folder}: {name!r} has the quant_type {strange.rpartition('__')[2]!r}, but "
            f"bitsandbytes' 4-bit types are {' and '.join(QUANT_TYPES)}: take the 16-bit "
            "checkpoint."
        )
    try:
        state = json.loads(weights.read(blob).tobytes().decode("utf-8"))
        config = QuantConfig(state["quant_type"], int(state["blocksize"]), "nested_offset" in state)
        shape, dtype = tuple(map(int, state["shape"])), dtype_name(str(state["dtype"]))
        offset = float(state["nested_offset"]) if config.double_quant else None
        if config.quant_type not in QUANT_TYPES or min(shape, default=0) < 1:
            raise ValueError(f"quant_type {config.quant_type!r}, shape {list(shape)}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{weights.folder}: {blob!r} is no quant_state of bitsandbytes ({error!r}): fetch the "
            "checkpoint again."
        ) from error
    needed = [name, *(name + part for part in (_PARTS if config.double_quant else _PARTS[:2]))]
    absent = [part for part in needed if part not in weights]
    if absent:
        raise ValueError(f"{weights.folder} lacks {absent[0]!r}: fetch the checkpoint again.")
    _check_sizes(weights, name, config, shape)
    tables = [(f"{name}.quant_map", CODEBOOKS[config.quant_type])]
    if config.double_quant:
        tables.append((f"{name}.nested_quant_map", DYNAMIC_SIGNED))
    for key, table in tables:
        # Its tables differ from ours in the last bit where they were computed on another machine.
        if not np.allclose(weights.read(key).ravel(), table, rtol=0, atol=1e-6):
            raise ValueError(
                f"{weights.folder}: {key!r} is not bitsandbytes' table: quantize the 16-bit "
                "checkpoint instead."
            )
    if config.double_quant and state.get("nested_blocksize", NESTED_BLOCKSIZE) != NESTED_BLOCKSIZE:
        raise ValueError(
            f"{weights.folder}: {name!r} has nested blocks of {state['nested_blocksize']}, but "
            f"only {NESTED_BLOCKSIZE} is read: quantize the 16-bit checkpoint instead."
        )
    return PackedState(config, shape, DTYPES[dtype].name, offset)


def _check_sizes(
    weights: WeightFolder, name: str, config: QuantConfig, shape: tuple[int, ...]
) -> None:
    """Refuses codes and scales of another number or dtype than the weight's shape calls for."""
    if weights.dtypes[name] not in _ITEM_BYTES:
        raise ValueError(
            f"{weights.folder}: {name!r} is stored as {weights.dtypes[name]}, but codes as "
            f"{', '.join(_ITEM_BYTES)} are read: fetch the checkpoint again."
        )
    found = _ITEM_BYTES[weights.dtypes[name]] * math.prod(weights.shapes[name])
    expected = codes_shape(shape, config.quant_type)
    if found != math.prod(expected):
        raise ValueError(
            f"{weights.folder}: {name!r} has {found} bytes of codes, but its shape {list(shape)} "
            f"calls for {math.prod(expected)}: fetch the checkpoint again."
        )
    blocks = -(-math.prod(shape) // config.blocksize)
    scales = {".absmax": ("U8" if config.double_quant else "F32", blocks)}
    if config.double_quant:
        scales[".nested_absmax"] = ("F32", -(-blocks // NESTED_BLOCKSIZE))
    for part, (dtype, count) in scales.items():
        own = weights.dtypes[name + part], math.prod(weights.shapes[name + part])
        if own != (dtype, count):
            raise ValueError(
                f"{weights.folder}: {name + part!r} holds {own[1]} numbers of {own[0]}, but the "
                f"weight's shape {list(shape)} calls for {count} of {dtype}: fetch the checkpoint "
                "again."
            )


def read_packed(weights: WeightFolder, name: str) -> QuantizedTensor:
    """A 4-bit weight's bytes as a `QuantizedTensor` of NumPy arrays.

    Raises:
        ValueError: as `read_state`.
    """
    state = read_state(weights, name)
    # `quant_storage` may have written the same bytes as 16- or 32-bit numbers.
    codes = weights.read(name).reshape(-1).view(np.uint8)
    return QuantizedTensor(
        codes.reshape(codes_shape(state.shape, state.config.quant_type)),
        weights.read(f"{name}.absmax").reshape(-1),
        weights.read(f"{name}.nested_absmax").reshape(-1) if state.config.double_quant else None,
        None if state.offset is None else np.float32(state.offset),
        shape=state.shape,
        dtype=jnp.dtype(state.dtype),
        quant_type=state.config.quant_type,
        blocksize=state.config.blocksize,
    )


def packed_tensors(name: str, weight: QuantizedTensor) -> dict[str, np.ndarray]:
    """A weight as the tensors of a checkpoint: `read_packed` the other way round.

    Args:
        name: of the weight.
        weight: a single tensor, no stack.

    Raises:
        ValueError: its data type is not one of bitsandbytes'.
    """
    if weight.quant_type not in QUANT_TYPES:
        raise ValueError(
            f"{name!r} is quantized as {weight.quant_type!r}, for which bitsandbytes has no 4-bit "
            f"format: quantize as {' or '.join(QUANT_TYPES)}, or dequantize."
        )
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": weight.dtype.name,
        "shape": list(weight.shape),
    }
    tensors = {
        name: np.asarray(weight.codes).reshape(-1, 1),
        f"{name}.absmax": np.asarray(weight.absmax),
        f"{name}.quant_map": CODEBOOKS[weight.quant_type],
    }
    if weight.double_quant:
        tensors[f"{name}.nested_absmax"] = np.asarray(weight.nested_absmax)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_SIGNED
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": float(weight.offset),
        }
    blob = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors | {f"{name}{_STATE}{weight.quant_type}": blob}


def quantization_config(
    quant: QuantConfig, compute_dtype: str, skip_modules: list[str] | None = None
) -> dict[str, Any]:
    """What config.json says of a folder in 4 bits, as transformers writes it.

    Args:
        quant: of its weights.
        compute_dtype: what transformers multiplies in, such as "bfloat16".
        skip_modules: the linear layers that are dense (`dense_modules.skip_modules`).
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant.quant_type,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def check_method(config: Mapping[str, Any], weights: WeightFolder) -> None:
    """Refuses a folder that is quantized in another format than bitsandbytes' 4-bit one.

    Raises:
        ValueError: config.json says so.
    """
    given = config.get("quantization_config")
    if not given:
        return
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if method != "bitsandbytes" or not packed_names(weights):
        raise ValueError(
            f"{weights.folder} is quantized by {method!r}, but of quantized checkpoints only "
            "bitsandbytes' 4-bit ones are read: take the 16-bit one."
        )
