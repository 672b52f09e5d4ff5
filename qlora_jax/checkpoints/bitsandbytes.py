"""4-bit weights as bitsandbytes stores them: read as they are, never dequantized on the way.

A weight `X` takes several tensors of a checkpoint:

    X                                 codes, uint8 [(n + 1) // 2, 1], high nibble first
    X.absmax                          uint8 codes with double quantization, else float32
    X.quant_map                       the code table, float32 [16]
    X.nested_absmax, X.nested_quant_map   with double quantization: float32
    X.quant_state.bitsandbytes__nf4   UTF-8 JSON: quant_type, blocksize, shape, nested_offset, ...

Our `QuantizedTensor` holds the same bytes; only their shape differs.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCKSIZE
from qlora_jax.checkpoints.folder import WeightFolder
from qlora_jax.quant import QuantConfig, QuantizedTensor

_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"


class PackedState(NamedTuple):
    """What a weight's JSON says about its bytes."""

    config: QuantConfig
    shape: tuple[int, ...]
    offset: float | None


def stored_config(config: Mapping[str, Any], weights: WeightFolder) -> QuantConfig | None:
    """How the weights of a folder are quantized; None where they are not.

    Args:
        config: its config.json.
        weights: its tensors; the first 4-bit one speaks for all.

    Raises:
        ValueError: they are quantized, but not in bitsandbytes' 4-bit format.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    name = next((name for name in weights if _STATE in name), None)
    if given.get("quant_method") != "bitsandbytes" or name is None:
        raise ValueError(
            f"{weights.folder} is quantized by {given.get('quant_method')!r}, but of quantized "
            "checkpoints only bitsandbytes' 4-bit ones are read: take the 16-bit one."
        )
    return read_state(weights, name.partition(_STATE)[0]).config


def is_part(name: str) -> bool:
    """Whether a tensor belongs to a 4-bit weight of another name."""
    return name.endswith(_PARTS) or _STATE in name


def read_state(weights: WeightFolder, name: str) -> PackedState:
    """The description of a 4-bit weight: small, read before anything heavy.

    Raises:
        ValueError: the weight is not 4-bit, one of its parts is missing, or its code tables are
            not bitsandbytes' own.
    """
    blob = next((f"{name}{_STATE}{t}" for t in CODEBOOKS if f"{name}{_STATE}{t}" in weights), None)
    if blob is None:
        raise ValueError(
            f"{weights.folder}: {name!r} has no quant_state, but config.json says that the layers "
            "are quantized in 4 bits: fetch the whole checkpoint again."
        )
    state = json.loads(weights.read(blob).tobytes().decode("utf-8"))
    nested = "nested_offset" in state
    needed = [name, *(name + part for part in (_PARTS if nested else _PARTS[:2]))]
    absent = [part for part in needed if part not in weights]
    if absent:
        raise ValueError(f"{weights.folder} lacks {absent[0]!r}: fetch the checkpoint again.")
    config = QuantConfig(state["quant_type"], int(state["blocksize"]), nested)
    tables = [(f"{name}.quant_map", CODEBOOKS[config.quant_type])]
    if nested:
        tables.append((f"{name}.nested_quant_map", DYNAMIC_SIGNED))
    for key, table in tables:
        # Its tables differ from ours in the last bit where they were computed on another machine.
        if not np.allclose(weights.read(key).ravel(), table, rtol=0, atol=1e-6):
            raise ValueError(
                f"{weights.folder}: {key!r} is not bitsandbytes' table: quantize the 16-bit "
                "checkpoint instead."
            )
    if nested and state.get("nested_blocksize", NESTED_BLOCKSIZE) != NESTED_BLOCKSIZE:
        raise ValueError(
            f"{weights.folder}: {name!r} has nested blocks of {state['nested_blocksize']}, but "
            f"only {NESTED_BLOCKSIZE} is read: quantize the 16-bit checkpoint instead."
        )
    return PackedState(config, tuple(state["shape"]), state.get("nested_offset"))


def read_packed(weights: WeightFolder, name: str, target: QuantizedTensor) -> QuantizedTensor:
    """A 4-bit weight's bytes as a `QuantizedTensor` of NumPy arrays.

    Args:
        weights: the folder.
        name: of the weight.
        target: what it will fill, one layer of it: gives the static part and the codes' shape.

    Raises:
        ValueError: it is stored in another way than the target, or its bytes are too few or many.
    """
    state = read_state(weights, name)
    expected_config = QuantConfig(target.quant_type, target.blocksize, target.double_quant)
    if state.config != expected_config:
        raise ValueError(
            f"{weights.folder}: {name!r} is stored as {state.config}, but other weights as "
            f"{expected_config}: quantize the 16-bit checkpoint instead."
        )
    # `quant_storage` may have written the same bytes as 16- or 32-bit numbers.
    codes = weights.read(name).reshape(-1).view(np.uint8)
    expected = (target.size + 1) // 2
    if codes.size != expected:
        raise ValueError(
            f"{weights.folder}: {name!r} has {codes.size} bytes of codes, but its shape "
            f"{list(target.shape)} calls for {expected}: fetch the checkpoint again."
        )
    even = target.shape[-1] % 2 == 0
    return QuantizedTensor(
        codes.reshape(*target.shape[:-1], -1) if even else codes,
        weights.read(f"{name}.absmax").reshape(-1),
        weights.read(f"{name}.nested_absmax").reshape(-1) if state.config.double_quant else None,
        None if state.offset is None else np.float32(state.offset),
        shape=target.shape,
        dtype=target.dtype,
        quant_type=target.quant_type,
        blocksize=target.blocksize,
    )
