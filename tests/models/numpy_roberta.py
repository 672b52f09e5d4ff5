"""RoBERTa with a classification head in NumPy float64, from a checkpoint's own tensor names.

Written from the papers (1810.04805, 1907.11692), and sharing nothing with the model under test.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def scores(
    tensors: dict[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, *, heads: int, pad: int
) -> np.ndarray:
    """Scores [batch, labels] of token ids [batch, seq]; mask: true at real tokens."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    table = "roberta.embeddings.{}_embeddings.weight"
    positions = np.full(ids.shape, pad)
    for row, column in np.argwhere(ids != pad):
        positions[row, column] = pad + 1 + (ids[row, :column] != pad).sum()
    x = t[table.format("word")][ids] + t[table.format("position")][positions]
    x = norm(x + t[table.format("token_type")][0], "roberta.embeddings.LayerNorm")
    layer = 0
    while f"roberta.encoder.layer.{layer}.output.dense.weight" in t:
        name = f"roberta.encoder.layer.{layer}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}").reshape(*ids.shape, heads, -1)
            for part in ("query", "key", "value")
        )
        mixed = np.zeros_like(value)
        for b in range(len(ids)):
            for h in range(heads):
                weights = query[b, :, h] @ key[b, :, h].T / math.sqrt(query.shape[-1])
                weights = np.exp(np.where(mask[b][None, :], weights, -np.inf))
                mixed[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value[b, :, h]
        out = linear(mixed.reshape(x.shape), f"{name}.attention.output.dense")
        x = norm(x + out, f"{name}.attention.output.LayerNorm")
        inner = linear(x, f"{name}.intermediate.dense")
        inner = inner * 0.5 * (1 + _erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        layer += 1
    return linear(np.tanh(linear(x[:, 0], "classifier.dense")), "classifier.out_proj")
