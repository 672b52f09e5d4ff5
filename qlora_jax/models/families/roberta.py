"""RoBERTa with a classification head: from a finetuned classifier, or from the pretrained model.

A pretrained checkpoint has no head for the task; it gets a new one, as small random numbers, and
what it has instead (the language-modelling head, the pooler) is left out.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.encoder import EncoderClassifier
from qlora_jax.models.encoder_config import EncoderConfig
from qlora_jax.models.family import Family, Slot, number, required


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    """A RoBERTa's config.json as an `EncoderConfig`.

    Raises:
        ValueError: a field is missing, or asks for what is not implemented.
    """
    for name, known in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
    ):
        if config.get(name, known) != known:
            raise ValueError(
                f"config.json has {name} {config[name]!r}, but a RoBERTa here has {known!r}: "
                "check that the file belongs to the checkpoint."
            )
    labels = config.get("id2label") or {}
    dropout = config.get("classifier_dropout")
    return EncoderConfig(
        vocab_size=required(config, "vocab_size"),
        hidden_size=required(config, "hidden_size"),
        intermediate_size=required(config, "intermediate_size"),
        num_hidden_layers=required(config, "num_hidden_layers"),
        num_attention_heads=required(config, "num_attention_heads"),
        max_position_embeddings=config.get("max_position_embeddings", 512),
        type_vocab_size=config.get("type_vocab_size", 2),
        layer_norm_eps=number(config, "layer_norm_eps", 1e-12),
        pad_token_id=config.get("pad_token_id", 1),
        hidden_dropout_prob=number(config, "hidden_dropout_prob", 0.1),
        attention_probs_dropout_prob=number(config, "attention_probs_dropout_prob", 0.1),
        classifier_dropout=None if dropout is None else number(config, "classifier_dropout", 0.0),
        num_labels=len(labels) or config.get("num_labels", 2),
        label_names=tuple(labels[label] for label in sorted(labels, key=int)),
    )


def write_config(config: EncoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    labels = config.label_names
    if len(labels) != config.num_labels:
        labels = tuple(f"LABEL_{label}" for label in range(config.num_labels))
    return {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "classifier_dropout": config.classifier_dropout,
        # Hugging Face counts labels by their names.
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def weight_names(config: EncoderConfig) -> dict[str, Slot]:
    """Every tensor of a RoBERTa classifier's checkpoint, by its name there."""
    names: dict[str, Slot] = {}
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        names[f"roberta.embeddings.{table}.weight"] = Slot(("embeddings", table, "weight"), None)
    norm = ("embeddings", "LayerNorm")
    for part in ("weight", "bias"):
        names[f"roberta.embeddings.LayerNorm.{part}"] = Slot((*norm, part), None)
    linears = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    for layer in range(config.num_hidden_layers):
        prefix = f"roberta.encoder.layer.{layer}"
        for linear in linears:
            path = ("layers", *linear.split("."))
            names[f"{prefix}.{linear}.weight"] = Slot((*path, "kernel"), layer)
            names[f"{prefix}.{linear}.bias"] = Slot((*path, "bias"), layer)
        for owner in ("attention.output", "output"):
            path = ("layers", *owner.split("."), "LayerNorm")
            for part in ("weight", "bias"):
                names[f"{prefix}.{owner}.LayerNorm.{part}"] = Slot((*path, part), layer)
    for linear in ("dense", "out_proj"):
        for part in ("weight", "bias"):
            names[f"classifier.{linear}.{part}"] = Slot(("classifier", linear, part), None)
    return names


ROBERTA = Family(
    "roberta",
    read_config,
    write_config,
    weight_names,
    EncoderClassifier,
    ignored=("lm_head.*", "roberta.pooler.*", "roberta.embeddings.position_ids"),
    fresh=("classifier.*",),
    root="roberta",
    output=None,
    linears=("classifier.*", "lm_head.*", "roberta.pooler.*"),
)
