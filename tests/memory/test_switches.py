"""What each memory switch saves, from the compiler's own report for a card (none is needed)."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import PLUGIN_HINT, compile_for, gpu_compiler_available
from qlora_jax.models import chunked_cross_entropy, cross_entropy

pytestmark = pytest.mark.skipif(
    not gpu_compiler_available(), reason=f"no GPU compiler here. {PLUGIN_HINT}"
)


def test_chunked_cross_entropy_holds_one_chunk_of_logits():
    tokens, embed, vocab, chunk = 8192, 256, 32000, 512
    hidden = jax.ShapeDtypeStruct((1, tokens, embed), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((vocab, embed), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def head(weight):
        return lambda x: jnp.einsum("...e,ve->...v", x, weight, preferred_element_type=jnp.float32)

    def whole(hidden, weight, targets):
        return cross_entropy(head(weight)(hidden), targets).sum()

    def by_chunk(hidden, weight, targets):
        return chunked_cross_entropy(head(weight), hidden, targets, chunk=chunk)

    def temporaries(function):
        compiled = compile_for(CARDS["l40"], jax.value_and_grad(function), hidden, weight, targets)
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * vocab * chunk
    assert temporaries(whole) >= 4 * vocab * tokens
    # The chunk's logits, their gradient, and arrays of the hidden states' size.
    assert temporaries(by_chunk) <= 3 * logits + 6 * tokens * embed * 2
