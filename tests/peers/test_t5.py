"""T5 beside transformers: buckets, a head of its own, loss, generation, PEFT's adapters."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints import load_adapter, load_model, read_adapter_config, save_model
from qlora_jax.generate import GenerationConfig, generate
from qlora_jax.models import seq2seq_loss, shift_right
from qlora_jax.models.relative_bias import relative_buckets

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")
pytestmark = pytest.mark.filterwarnings("default")

IDS = np.asarray([[5, 9, 30, 7, 22, 1], [11, 4, 1, 0, 0, 0]], np.int32)
MASK = IDS != 0
LABELS = np.asarray([[8, 3, 1], [6, 1, -100]], np.int32)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 16), (64, 1000)])
def test_buckets(bidirectional, buckets, longest):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-3000, 3001)
    options = {"bidirectional": bidirectional, "num_buckets": buckets, "max_distance": longest}
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distances), **options).numpy()
    np.testing.assert_array_equal(relative_buckets(distances, **options), theirs)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A random T5 v1.1 whose head is not its embedding, as Flan-T5's is not."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    peer = transformers.T5ForConditionalGeneration(config)
    peer.lm_head.weight = torch.nn.Parameter(torch.randn(40, 32))
    peer.save_pretrained(folder)
    return folder, peer.eval()


def ours(folder, **options):
    options = {"quant": None, "lora": None, "compute_dtype": jnp.float32} | options
    return load_model(folder, **options)


def their_logits(model):
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(IDS).long(),
            attention_mask=torch.from_numpy(MASK).long(),
            labels=torch.from_numpy(LABELS).long(),
        )


def our_logits(model):
    read = shift_right(jnp.asarray(LABELS), start=0, pad=0)
    return np.asarray(model(jnp.asarray(IDS), read, jnp.asarray(MASK)))


def close(actual, expected) -> bool:
    return bool(np.abs(actual - expected).max() < 5e-6 * np.ptp(expected))


def test_a_head_of_its_own_and_the_loss(case, tmp_path):
    folder, peer = case
    model = ours(folder)
    assert model.lm_head is not None
    expected = their_logits(peer)
    assert close(our_logits(model), expected.logits.numpy())
    loss = seq2seq_loss(model, jnp.asarray(IDS), jnp.asarray(LABELS), jnp.asarray(MASK))
    assert float(loss.mean) == pytest.approx(float(expected.loss), rel=1e-5)
    save_model(tmp_path, model)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(their_logits(back).logits.numpy(), expected.logits.numpy())


def test_greedy_generation(case):
    folder, peer = case
    written = peer.generate(
        torch.from_numpy(IDS).long(),
        attention_mask=torch.from_numpy(MASK).long(),
        max_new_tokens=12,
        do_sample=False,
        use_cache=False,  # theirs has a slot for each encoder layer, and the decoder is deeper
    ).numpy()
    config = GenerationConfig(max_new_tokens=12, eos_token_ids=(1,))
    prompts = [row[mask].tolist() for row, mask in zip(IDS, MASK, strict=True)]
    for theirs, found in zip(written, generate(ours(folder), prompts, config), strict=True):
        assert list(found.tokens) == theirs[1 : 1 + len(found.tokens)].tolist()
        assert not theirs[1 + len(found.tokens) :].any()


def test_pefts_adapter(case, tmp_path):
    peft = pytest.importorskip("peft", reason="make test-peers installs it")
    folder, _ = case
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    lora = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"
    )
    adapted = peft.get_peft_model(base, lora).eval()
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(tmp_path)
    model = ours(folder, lora=read_adapter_config(tmp_path))
    load_adapter(tmp_path, model)
    assert close(our_logits(model), their_logits(adapted).logits.numpy())
