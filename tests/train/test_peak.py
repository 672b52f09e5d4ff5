"""What a process held at most, counted anew for each run."""

import sys

import numpy as np
import pytest

from qlora_jax.train.peak import forget_peak_host_bytes, peak_host_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone forgets a peak")
def test_a_peak_is_forgotten():
    size = 256 * 2**20
    before = peak_host_bytes()
    np.ones(size, np.uint8)
    after = peak_host_bytes()
    assert after >= before
    forget_peak_host_bytes()
    assert peak_host_bytes() < after - size // 2
    np.ones(size, np.uint8)
    assert peak_host_bytes() > after - size // 2
