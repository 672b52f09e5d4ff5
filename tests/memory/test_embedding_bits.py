"""What embedding and head in 8 or 4 bits save, and that nothing else grows by it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import compile_for
from qlora_jax.checkpoints.fill import put_piece
from qlora_jax.models import chunked_cross_entropy
from qlora_jax.plan import program_bytes
from qlora_jax.plan.workload import Program, tree_bytes
from qlora_jax.quant import PIECE, quantize, row_config, row_scores, take_rows
from tests.memory.goals import GIB, needs_compiler, planned

pytestmark = needs_compiler

VOCAB, EMBED = 128256, 4096


def head(bits: int):
    """Llama 3 8B's, in shapes."""
    dense = jax.ShapeDtypeStruct((VOCAB, EMBED), jnp.bfloat16)
    return jax.eval_shape(lambda w: quantize(w, row_config(bits, EMBED)), dense)


@pytest.mark.parametrize("bits", [8, 4])
def test_neither_rows_nor_scores_decode_the_matrix(bits) -> None:
    tokens, chunk = 2048, 128
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(ids, w):
        def of(hidden):
            return chunked_cross_entropy(lambda x: row_scores(x, w), hidden, ids, chunk=chunk)

        return jax.value_and_grad(of)(take_rows(w, ids).dequantize(implementation="xla"))

    compiled = compile_for(CARDS["l40"], loss, ids, head(bits))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    # A chunk's scores and their gradient, a decoded piece twice, arrays of the hidden states' size.
    assert temporaries <= 3 * 4 * VOCAB * chunk + 2 * 2 * PIECE + 8 * 2 * tokens * EMBED
    assert temporaries < 2 * VOCAB * EMBED / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_a_piece_goes_into_the_codes_in_place(bits) -> None:
    rows = PIECE // EMBED
    piece = jax.ShapeDtypeStruct((rows, EMBED), jnp.bfloat16)
    codes = head(bits)

    def write(codes, piece, start):
        return put_piece(codes, quantize(piece, row_config(bits, EMBED)), start)

    start = jax.ShapeDtypeStruct((), jnp.int32)
    program = Program(jax.jit(write, donate_argnums=0), (codes, piece, start))
    found = program_bytes(program, CARDS["l40"])
    assert found.aliased >= tree_bytes(codes)
    assert found.temporaries <= 2 * tree_bytes(piece)
    assert found.device <= tree_bytes(codes) + 3 * tree_bytes(piece)


@pytest.mark.slow
def test_a_step_of_llama_3_8b_saves_all_that_its_vocabulary_shrinks_by() -> None:
    dense = planned("llama-3-8b", "l40", lora_dtype=jnp.bfloat16)
    weights = 2 * VOCAB * EMBED
    assert dense.device.embeddings == 2 * weights
    packed = planned("llama-3-8b", "l40", lora_dtype=jnp.bfloat16, embedding_bits=8)
    # Codes, and a float32 absmax for 64 of them.
    assert packed.device.embeddings == weights * 8.5 / 8
    # 0.92 GiB; no temporary eats more than a thirtieth of one.
    saved = dense.device.embeddings - packed.device.embeddings
    assert dense.device.total - packed.device.total >= saved - GIB // 32
