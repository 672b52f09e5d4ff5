"""The code tables equal bitsandbytes' bit for bit."""

import numpy as np
import pytest

from pallas_kernels import CODEBOOKS, DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from tests.shared import shared_path

TABLES = np.load(shared_path("vectors/quant") / "tables.npz")
OURS = {**CODEBOOKS, "dynamic_signed": DYNAMIC_SIGNED, "dynamic_unsigned": DYNAMIC_UNSIGNED}


@pytest.mark.parametrize("name", sorted(set(OURS) & set(TABLES.files)))
def test_table_equals_bitsandbytes(name):
    # As numbers: FP4's second zero (code 8) may carry either sign.
    np.testing.assert_array_equal(OURS[name], TABLES[name].reshape(-1))
    assert OURS[name].dtype == np.float32


def test_all_published_tables_are_compared():
    assert {"nf4", "fp4", "dynamic_signed", "dynamic_unsigned"} <= set(TABLES.files)


@pytest.mark.parametrize(("name", "half"), [("int4", 8), ("int8", 128)])
def test_integers_are_evenly_spaced(name, half):
    codes = np.arange(2 * half)
    np.testing.assert_allclose(CODEBOOKS[name], (codes - half) / (half - 1), rtol=1e-7)


def test_e3m0_is_sign_and_power_of_two():
    table = CODEBOOKS["fp4_e3m0"]
    np.testing.assert_array_equal(table[1:8], 2.0 ** np.arange(-6, 1))
    np.testing.assert_array_equal(table[8:], -table[:8])
