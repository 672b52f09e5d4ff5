"""The cards' descriptions, and compiling for them at all."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels import compile_for as harness
from pallas_kernels.cards import CARDS, find_card

needs_plugin = pytest.mark.skipif(
    not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
)


def shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def test_cards_are_found_by_name_and_by_the_kind_jax_reports():
    assert find_card("H200").description == "NVIDIA H200"
    assert find_card("NVIDIA GeForce RTX 4090").name == "rtx-4090"
    with pytest.raises(ValueError, match="Unknown card 'gtx-480'; expected one of a100-40"):
        find_card("gtx-480")


def test_names_are_unique_and_sizes_plausible():
    assert len({card.description for card in CARDS.values()}) == len(CARDS)
    for card in CARDS.values():
        assert 10e9 < card.memory < 300e9
        assert 100e9 < card.bandwidth < 1e13
        # Every card of the table is memory-bound below some hundred FLOP per byte.
        assert 50 < card.matmul_flops / card.bandwidth < 400, card.name
        assert card.multiprocessor.smem_optin <= card.multiprocessor.smem


def test_arch_names():
    assert CARDS["h200"].arch == "sm_90a"
    assert CARDS["rtx-4090"].arch == "sm_89"
    assert CARDS["b200"].arch == "sm_100a"


@needs_plugin
@pytest.mark.parametrize("name", CARDS)
def test_xla_compiles_for_every_card(name):
    compiled = harness.compile_for(CARDS[name], lambda x, w: x @ w, shape(64, 256), shape(256, 128))
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 2 * (64 * 256 + 256 * 128)
    assert memory.output_size_in_bytes == 2 * 64 * 128


@needs_plugin
def test_arrays_and_trees_stand_for_their_shapes():
    tree = {"a": jnp.ones((4, 8)), "b": [jnp.int32(3), 2.0]}
    compiled = harness.compile_for(CARDS["l40"], lambda t: t["a"].sum() * t["b"][0], tree)
    assert compiled.memory_analysis().argument_size_in_bytes >= 4 * 8 * 4


@needs_plugin
def test_donated_arguments_are_honoured():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    memory = harness.compile_for(CARDS["h200"], step, shape(1024, 1024)).memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 1024 * 1024


@needs_plugin
def test_kernels_of_a_fusion_are_taken_apart():
    card, x = CARDS["a100-80"], shape(512, 4096)
    _, kernels = harness.inspect_kernels(card, lambda x: jnp.sin(x).sum(axis=1), x, sass=True)
    assert kernels
    assert all(".entry" in kernel.ptx and kernel.threads > 0 for kernel in kernels)
    if harness.find_tool("ptxas"):
        assert all(kernel.registers > 0 and kernel.spill_bytes == 0 for kernel in kernels)
    if harness.find_tool("ptxas") and harness.find_tool("nvdisasm"):
        assert "EXIT" in kernels[0].sass


def test_without_the_plugin_the_error_names_the_wheels(monkeypatch):
    harness.card_mesh.cache_clear()
    monkeypatch.setattr(harness, "gpu_compiler_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"jax-cuda13-plugin==.* jax-cuda13-pjrt=="):
        harness.compile_for(CARDS["h200"], lambda x: x, shape(2, 2))


@needs_plugin
def test_programs_for_absent_cards_stay_out_of_the_persistent_cache(tmp_path):
    """Which takes them, but warns of a damaged entry where it should give them back."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        # JAX decides once whether there is a cache.
        compilation_cache.reset_cache()
        for _ in range(2):
            harness.compile_for(CARDS["l40"], lambda x: x + 1, shape(16, 16))
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x + 1).lower(shape(16, 16)).compile()
        assert list(tmp_path.iterdir()), "what is compiled for this machine is kept"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@needs_plugin
def test_a_card_s_program_is_optimized_whatever_this_machine_s_are():
    def code(disabled: bool) -> str:
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", disabled)
        try:
            _, (kernel,) = harness.inspect_kernels(
                CARDS["l40"], lambda x: jnp.sin(x).sum(axis=1), shape(512, 4096)
            )
        finally:
            jax.config.update("jax_disable_most_optimizations", before)
        return kernel.ptx

    assert code(disabled=True) == code(disabled=False)
