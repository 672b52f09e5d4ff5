"""What a process held at most, counted anew for each run."""

import subprocess
import sys

import numpy as np
import pytest

from qlora_jax.train import peak
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


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts the parent's")
def test_what_the_parent_holds_is_not_counted():
    size = 512 * 2**20
    held = np.ones(size, np.uint8)
    code = "from qlora_jax.train.peak import peak_host_bytes; print(peak_host_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = peak_host_bytes() - int(child.stdout)
    assert told > size // 2, held.nbytes


@pytest.mark.parametrize(
    ("before", "after", "told"), [(None, None, None), (None, 5, 5), (3, 5, 5), (5, 5, None)]
)
def test_a_device_peak_is_of_the_cell_that_reached_it(monkeypatch, before, after, told):
    monkeypatch.setattr(peak, "peak_device_bytes", lambda: after)
    assert peak.device_peak_since(before) == told
