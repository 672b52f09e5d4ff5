"""What every test needs before JAX starts, and property tests that draw the same examples each run.

`pytest --hypothesis-profile=explore` draws fresh ones instead: run it before a format changes.

Nearly all of the tests' time is XLA's, and half of that is LLVM making fast a program that runs
once. So most tests turn LLVM's optimizations off (`JAX_DISABLE_MOST_OPTIMIZATIONS=0` leaves them
on); XLA's own (fusion, layouts, memory) stay. All are on where bits are asserted that LLVM may
change, where reference results are met, and where running takes longer than compiling: in the
folders of `OPTIMIZED` and under `pytest.mark.optimized` or `slow`. So they are in whatever is
compiled for a card (`compile_lowered`).

What one worker, test or run has compiled, the next one reads from JAX's persistent cache (`make
clean` empties it). Programs for cards that are not there are kept out of it by `compile_lowered`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on one CPU, so that sharding is tested everywhere.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Not the GPU compiler's own caches, or what is planned for a card could depend on earlier runs.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

OPTIMIZED = {"pallas_kernels", "quant", "vectors"}

# Compiling takes longer than hypothesis' deadline of 200 ms an example.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")


def _is_optimized(item: pytest.Item) -> bool:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return folder in OPTIMIZED or any(map(item.get_closest_marker, ("optimized", "slow")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is optimized comes first: each change from one to the other compiles anew."""
    items.sort(key=_is_optimized, reverse=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles a test's programs, and its fixtures', as it wants them."""
    import jax

    plainly = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] not in ("0", "false", "")
    plainly = plainly and not _is_optimized(item)
    if jax.config.read("jax_disable_most_optimizations") != plainly:
        jax.config.update("jax_disable_most_optimizations", plainly)
        # What is compiled already was compiled the other way.
        jax.clear_caches()


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the tests' own check of types, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
