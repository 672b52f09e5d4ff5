"""RoBERTa with a classification head beside transformers' own."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints import load_model, save_model
from qlora_jax.models import classification_loss

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")
pytestmark = pytest.mark.filterwarnings("default")

IDS = np.asarray([[0, 5, 9, 30, 7, 22, 2], [0, 11, 2, 1, 1, 1, 1]], np.int32)
MASK = IDS != 1


def config(num_labels: int):
    return transformers.RobertaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.3,
        num_labels=num_labels,
    )


def theirs(model, **labels):
    with torch.no_grad():
        ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK).long()
        return model.eval()(ids, attention_mask=mask, **labels)


def ours(folder, **options):
    return load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32, **options)


@pytest.mark.parametrize(("num_labels", "labels"), [(3, [2, 0]), (1, [0.5, -1.25])])
def test_scores_and_loss_of_the_same_folder(tmp_path, num_labels, labels):
    torch.manual_seed(0)
    peer = transformers.RobertaForSequenceClassification(config(num_labels))
    peer.save_pretrained(tmp_path)
    model = ours(tmp_path)
    expected = theirs(peer, labels=torch.tensor(labels))
    scores = np.asarray(model(jnp.asarray(IDS), jnp.asarray(MASK)))
    reference = expected.logits.numpy()
    assert np.abs(scores - reference).max() < 5e-6 * np.abs(reference).max()
    dtype = jnp.float32 if num_labels == 1 else jnp.int32
    loss = classification_loss(
        model, jnp.asarray(IDS), jnp.asarray(labels, dtype), jnp.asarray(MASK)
    )
    assert float(loss.total) / 2 == pytest.approx(float(expected.loss), rel=1e-5)


def test_a_folder_written_here_is_read_there(tmp_path):
    torch.manual_seed(1)
    peer = transformers.RobertaForSequenceClassification(config(3))
    peer.save_pretrained(tmp_path / "there")
    save_model(tmp_path / "here", ours(tmp_path / "there"))
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "here")
    assert back.config.num_labels == 3
    np.testing.assert_array_equal(theirs(back).logits.numpy(), theirs(peer).logits.numpy())


def test_a_pretrained_folder_gets_a_head(tmp_path):
    torch.manual_seed(2)
    peer = transformers.RobertaForMaskedLM(config(2))
    peer.save_pretrained(tmp_path)
    model = ours(tmp_path, overrides={"num_labels": 4})
    with torch.no_grad():
        ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK).long()
        hidden = peer.eval().roberta(ids, attention_mask=mask).last_hidden_state.numpy()
    found = np.asarray(model.hidden(jnp.asarray(IDS), jnp.asarray(MASK)))
    assert np.abs(found - hidden)[MASK].max() < 5e-6 * np.abs(hidden).max()
    assert model(jnp.asarray(IDS)).shape == (2, 4)
