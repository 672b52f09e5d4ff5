"""Shares of non-normal hidden units: of drawn weights, where they are known, and of a model."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import binom, shapiro

from experiments.embedded import MODELS
from experiments.paper import normality
from qlora_jax.checkpoints import WeightFolder, open_checkpoint, save_model
from qlora_jax.quant import QuantConfig
from tests.models.variants import VARIANTS
from tests.random_decoder import ONE_LAYER, random_decoder

UNITS, INPUTS = 4000, 128


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def non_normal(weight: np.ndarray) -> int:
    _, p_values = normality.shapiro_wilk(weight)
    return int((p_values < normality.LEVEL).sum())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_of_normal_units_chance_rejects_one_in_twenty(rng, dtype):
    """Each with a mean and a spread of its own, and as coarse as checkpoints are."""
    means, spreads = rng.normal(size=(2, UNITS, 1)) * 0.02
    weight = (means + spreads * rng.normal(size=(UNITS, INPUTS))).astype(dtype)
    low, high = binom.interval(1 - 1e-4, UNITS, normality.LEVEL)
    assert low <= non_normal(weight) <= high


def test_what_is_not_normal_is_found(rng):
    uniform = rng.uniform(-1, 1, (200, 512))
    assert non_normal(uniform) == 200
    outlier = rng.normal(size=(200, 512))
    outlier[:, 7] = 20
    assert non_normal(outlier) == 200
    # Of no spread at all, and of so little that scipy would take it for none.
    assert non_normal(np.zeros((3, 512))) == 3
    assert non_normal(1e-25 * uniform) == 200


def test_agrees_with_scipy_row_by_row(rng):
    weight = rng.standard_t(5, (300, 200)).astype(np.float32)
    weight[17] = 0.5
    statistics, p_values = normality.shapiro_wilk(weight)
    for unit, row in enumerate(weight):
        expected = (0, 0) if unit == 17 else shapiro(row.astype(np.float64))
        np.testing.assert_allclose((statistics[unit], p_values[unit]), expected, rtol=1e-9)


def test_of_long_rows_a_random_part_is_tested(rng):
    """As scipy warns of p beyond 5,000 weights, and a warning is an error here."""
    weight = rng.normal(size=(300, normality.LONGEST + 1000))
    found = normality.shapiro_wilk(weight)
    np.testing.assert_array_equal(found, normality.shapiro_wilk(weight))
    assert (found[0][:5] != shapiro(weight[:5, : normality.LONGEST], axis=1).statistic).all()
    assert (found[0][:5] != shapiro(weight[:5, -normality.LONGEST :], axis=1).statistic).all()
    # A twelfth of a row, at its end or its beginning, that is found in each sample of it.
    for part in (slice(None, 500), slice(-500, None)):
        odd = weight.copy()
        odd[:, part] *= 3
        assert non_normal(odd) == 300


def test_a_line_has_the_median_and_the_share_of_all_units():
    w, p = np.array([0.9, 0.95, 0.999]), np.array([0.01, 0.2, 0.3])
    few = normality.Matrix("a", "kind", 0, 64, w[:1], p[:1])
    many = normality.Matrix("b", "kind", 1, 6000, np.tile(w, 3), np.tile(p, 3))
    line = ("kind", "10", "64, 6,000", "64, 5,000", "0.9500", "40.0%", "+35.0")
    assert normality._line("kind", [few, many]) == line


def test_the_command_on_an_embedded_model(tmp_path, capsys):
    assert normality.main(["stdlib-1m", "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "normality.json").read_text())
    matrices = {matrix["name"]: matrix for matrix in told["matrices"]}
    weights = WeightFolder(MODELS["stdlib-1m"])
    assert matrices.keys() == {name for name in weights if name.endswith("_proj.weight")}
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        rows = weights.read(name).astype(np.float64)
        tests = shapiro(rows, axis=1)
        assert matrices[name] == {
            "name": name,
            "kind": name.split(".")[-2],
            "layer": int(name.split(".")[2]),
            "units": len(rows),
            "inputs": rows.shape[1],
            "tested": rows.shape[1],
            "non_normal": (tests.pvalue < 0.05).sum(),
            "median_w": pytest.approx(np.median(tests.statistic), abs=1e-6),
        }
    table = (tmp_path / "out" / "normality.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "all", "LLaMA 7B, the paper",
    ]  # fmt: skip
    units = sum(matrix["units"] for matrix in matrices.values())
    share = sum(matrix["non_normal"] for matrix in matrices.values()) / units
    everything = f"| all | {units:,} | 128, 320 | 128, 320 | "
    assert table[-2].startswith(everything)
    assert table[-2].endswith(f" | {share:.1%} | {100 * share - 5:+.1f} |")
    assert table[-1].endswith(" | 7.5% | +2.5 |")
    assert (tmp_path / "out" / "normality.png").read_bytes()[:4] == b"\x89PNG"
    assert "non-normal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variant", "kinds"),
    [
        ("mixtral-window", "q_proj k_proj v_proj o_proj w1 w2 w3"),
        ("opt-350m", "q_proj k_proj v_proj out_proj fc1 fc2"),
    ],
)
def test_experts_are_matrices_and_what_lies_outside_of_layers_is_none(tmp_path, variant, kinds):
    save_model(tmp_path / "m", random_decoder(VARIANTS[variant]), dtype=jnp.dtype("float32"))
    layers = normality.linear_layers(open_checkpoint(tmp_path / "m"))
    assert {name.split(".")[-2] for name in layers} == set(kinds.split())
    assert all(f".layers.{layer}." in name for name, layer in layers.items())


def test_refusals(tmp_path, capsys):
    packed, broken, incomplete = (tmp_path / name for name in ("packed", "broken", "incomplete"))
    save_model(packed, random_decoder(ONE_LAYER, quant=QuantConfig("nf4")))
    model = random_decoder(ONE_LAYER)
    model.layers.mlp.up_proj.kernel[0, 3, 5] = np.nan
    save_model(broken, model, dtype=jnp.dtype("float32"))
    shutil.copytree(broken, incomplete)
    config = json.loads((incomplete / "config.json").read_text())
    (incomplete / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    for folder, words in (
        (packed, "is in nf4, where blocks hold sixteen numbers at most: give the"),
        (broken, f"up_proj.weight of {broken}: a weight is NaN or infinite, which no trained"),
        (incomplete, "layers.1"),
        ("stdlib-2m", "the nearest of these is stdlib-"),
    ):
        assert normality.main([str(folder), "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
