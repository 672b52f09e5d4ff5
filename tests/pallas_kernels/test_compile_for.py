"""What is read from compiled code, where no compiler is needed to see it."""

from pallas_kernels import CARDS, compile_for

PTX = """.target sm_89
.extern .shared .align 16 .b8 global_smem[];
.visible .entry pairs(.param .u64 p) .reqntid 128 { .shared .align 128 .b8 table[32768]; }
.visible .entry plain(.param .u64 p) .maxntid 64, 1, 1 { }
"""


def test_shared_memory_is_what_is_launched_with_and_what_is_declared(monkeypatch):
    """Triton's launch does not know of the table that inline PTX declares."""
    monkeypatch.setattr(compile_for, "_assemble", lambda *_: ({"pairs": (97, 0)}, {}))
    launches = {"pairs": compile_for._Launch((32,), 128, 23552)}
    pairs, plain = compile_for._take_apart(CARDS["l40"], PTX, launches, with_sass=False)
    assert (pairs.smem, pairs.grid, pairs.threads) == (56320, (32,), 128)
    assert (plain.smem, plain.grid, plain.threads) == (0, (), 64)
    assert (pairs.registers, plain.registers) == (97, None)
