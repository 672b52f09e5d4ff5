"""`load_pretrained`: a model and its tokenizer in one call, from a folder or from the hub.

A name that is a folder is read where it lies. Any other name, `org/name`, is fetched through
`huggingface_hub` into its cache (`HF_HOME`), or taken from there alone where `HF_HUB_OFFLINE=1`.
Only configuration, safetensors and tokenizer files are ever fetched: no pickles, no code.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_jax.checkpoints import load_model
from qlora_jax.data import Tokenizer, load_tokenizer
from qlora_jax.models import Decoder
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig

# `model*` and not every safetensors file: some repositories carry the same weights a second time
# under another name and in another layout.
_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "chat_template.jinja",
)


def load_pretrained(
    name_or_folder: str | Path,
    *,
    quant: QuantConfig | None = QuantConfig(),
    lora: LoraConfig | None = LoraConfig(),
    compute_dtype: Any = jnp.bfloat16,
    revision: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Decoder, Tokenizer]:
    """A pretrained model, quantized as it is read, and its tokenizer.

    Args:
        name_or_folder: a Hugging Face model folder, or a hub name `org/name`.
        quant: how the layers' linear weights are stored; None keeps them in `compute_dtype`.
        lora: adapters on them, as new; None for none.
        compute_dtype: dtype of activations and matmuls.
        revision: branch, tag or commit on the hub; None for its main branch.
        seed: of the adapters' initial A.
        options: the other arguments of `checkpoints.load_model`, such as `remat` or
            `trainable_base`.

    Returns:
        The model, its arrays on JAX's default device, and the tokenizer.

    Raises:
        FileNotFoundError: no such folder, hub name or revision, or files are missing there.
        PermissionError: the hub keeps the model behind a licence.
        ConnectionError: the hub cannot be reached and the cache lacks the model.
        ValueError: an unknown architecture or damaged files.
    """
    folder = find_folder(name_or_folder, revision=revision)
    model = load_model(
        folder, quant=quant, lora=lora, compute_dtype=compute_dtype, seed=seed, **options
    )
    return model, load_tokenizer(folder)


def find_folder(name_or_folder: str | Path, *, revision: str | None = None) -> Path:
    """A model's local folder: as given, or fetched from the hub. Raises as `load_pretrained`."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {folder} is a local folder, which has none: leave "
                "it out."
            )
        return folder
    name = str(name_or_folder)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a hub name of the form org/name: check the "
            "path."
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"The hub keeps {name!r} behind a licence: accept it on https://huggingface.co/{name}, "
            "then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} has no revision {revision!r} on the hub: give one of its branches, tags or "
            "commits."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a public model on the hub: check the spelling, "
            "or log in with `hf auth login` if it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{name!r} is no folder here, its files are not in the cache, and the hub cannot be "
            "reached: connect, unset HF_HUB_OFFLINE, or give a folder."
        ) from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise ConnectionError(f"The hub did not give {name!r}: {error}") from error
