"""`load_pretrained`: a model and its tokenizer in one call, from a folder, a file or the hub.

A name that is a folder or a GGUF file is read where it lies. Any other name, `org/name`, is fetched
through `huggingface_hub` into its cache (`HF_HOME`), or taken from there alone where
`HF_HUB_OFFLINE=1`. Only configuration, weights in safetensors (or one GGUF file,
`org/name/file.gguf`) and tokenizer files are ever fetched: no pickles, no code.
"""

import difflib
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from huggingface_hub import hf_hub_download, snapshot_download

from qlora_jax.checkpoints import checkpoint_tokenizer, load_model, open_checkpoint
from qlora_jax.checkpoints.folder import INDEX
from qlora_jax.checkpoints.hub import plain_words
from qlora_jax.checkpoints.open import COMPANIONS
from qlora_jax.data import Tokenizer
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig

# `model*` and not every safetensors file: some repositories carry the same weights a second time
# under another name and in another layout.
_FILES = ("config.json", "model*.safetensors", INDEX, *COMPANIONS)

# What users of transformers and PEFT know by other names.
_CALLED_HERE = {
    "load_in_4bit": "quant=QuantConfig()",
    "load_in_8bit": 'quant=QuantConfig("int8")',
    "quantization_config": "quant=QuantConfig(...)",
    "torch_dtype": "compute_dtype=",
    "dtype": "compute_dtype=",
    "device_map": "mesh=, for several devices",
    "attn_implementation": "attention=",
    "peft_config": "lora=",
    "adapter": "lora=read_adapter_config(folder), and then load_adapter(folder, model)",
}


def load_pretrained(
    name_or_folder: str | Path,
    *,
    quant: QuantConfig | None = QuantConfig(),
    lora: LoraConfig | None = LoraConfig(),
    compute_dtype: Any = jnp.bfloat16,
    revision: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Any, Tokenizer]:
    """A pretrained model, quantized as it is read, and its tokenizer.

    Args:
        name_or_folder: a Hugging Face model folder, a GGUF file, or a hub name `org/name`.
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
        TypeError: an unknown option.
    """
    _check_options(options)
    checkpoint = open_checkpoint(find_source(name_or_folder, revision=revision))
    model = load_model(
        checkpoint, quant=quant, lora=lora, compute_dtype=compute_dtype, seed=seed, **options
    )
    return model, checkpoint_tokenizer(checkpoint)


def _with_options(own: inspect.Signature, options: inspect.Signature) -> inspect.Signature:
    """A signature with what its `options` stand for in their place."""
    every = own.parameters | options.parameters
    names = [name for name in every if name not in ("options", "source")]
    return own.replace(parameters=[every[name] for name in names])


# What `help` and completion read.
load_pretrained.__signature__ = _with_options(  # type: ignore[attr-defined]
    inspect.signature(load_pretrained), inspect.signature(load_model)
)


def _check_options(options: Iterable[str]) -> None:
    """TypeError for an option that `load_pretrained` has not, naming the one that is meant."""
    known = list(inspect.signature(load_pretrained).parameters)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            here = _CALLED_HERE.get(name) or "".join(f"{option}=" for option in near)
            meant = f", but {here}" if here else ""
            raise TypeError(
                f"load_pretrained has no option {name!r}{meant}: give some of {', '.join(known)}."
            )


def find_source(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """What `open_checkpoint` reads: a file or folder as given, or fetched from the hub.

    Raises as `load_pretrained`.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        _refuse_revision(path, revision)
        return path
    name = str(name_or_path)
    if name.endswith(".gguf") and name.count("/") == 2 and not name.startswith((".", "/", "~")):
        repository, _, file = name.rpartition("/")
        with plain_words(repository, revision):
            return Path(hf_hub_download(repository, file, revision=revision))
    return find_folder(name_or_path, revision=revision)


def find_folder(
    name_or_folder: str | Path, *, revision: str | None = None, files: Sequence[str] = _FILES
) -> Path:
    """A model's local folder: as given, or with `files` (patterns) fetched from the hub. Raises as
    `load_pretrained`, and NotADirectoryError for a file."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        _refuse_revision(folder, revision)
        return folder
    if folder.is_file():
        raise NotADirectoryError(
            f"{folder} is a file, but a model's folder is needed here: of a GGUF file, `qlora-jax "
            f"export {folder} FOLDER --format safetensors` makes one."
        )
    name = str(name_or_folder)
    with plain_words(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))


def _refuse_revision(path: Path, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(
            f"revision is {revision!r}, but {path} is a local "
            f"{'folder' if path.is_dir() else 'file'}, which has none: leave it out."
        )
