"""What every test needs before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on one CPU, so that sharding is tested everywhere.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
