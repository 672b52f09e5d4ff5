"""What every test needs before JAX starts, and property tests that draw the same examples each run.

`pytest --hypothesis-profile=explore` draws fresh ones instead: run it before a format changes.
"""

import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on one CPU, so that sharding is tested everywhere.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# Compiling takes longer than hypothesis' deadline of 200 ms an example.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")
