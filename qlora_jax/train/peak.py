"""The most memory that was held: of this process on the host, of its devices."""

import contextlib
import re
import resource
import sys
from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")
"""Where Linux is told to count a process's largest resident set anew, by a 5 (proc(5))."""


def peak_host_bytes() -> int:
    """The most memory this process has held, in bytes (resident set), since it began or since
    `forget_peak_host_bytes`."""
    # Not getrusage where there is another way: on Linux it counts what the parent held at the start
    # (a notebook, a test's process), and never forgets that.
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_host_bytes() -> None:
    """Counts `peak_host_bytes` from here on, where the operating system can (Linux)."""
    with contextlib.suppress(OSError):
        _FORGET.write_text("5")


def peak_device_bytes() -> int | None:
    """The most memory any local device has held so far; None where the backend does not tell."""
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    return max(peaks, default=None)


def device_peak_since(before: int | None) -> int | None:
    """The same, None where it is what it was `before`: it only rises, and an earlier run of this
    process may have held as much."""
    peak = peak_device_bytes()
    return None if peak is None or peak <= (before or 0) else peak
