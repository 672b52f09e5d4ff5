"""The Hugging Face hub: its answers in plain words, and publishing a folder with a model card."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from qlora_jax.checkpoints.card import CARD, model_card, read_facts
from qlora_jax.checkpoints.folder import PICKLES, open_safetensors

PUBLISHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "README.md",
    "LICENSE*",
)
"""What is ever uploaded: no pickles, no code, no checkpoints of training."""


@contextlib.contextmanager
def plain_words(name: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the hub raises into one sentence that says what to do.

    Raises:
        FileNotFoundError: no such name, revision or file.
        PermissionError: behind a licence, or not logged in.
        ConnectionError: the hub cannot be reached, or answers something else.
    """
    try:
        yield
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
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"Publishing to {name!r} needs an account: log in with `hf auth login`, or set "
            "HF_TOKEN."
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
    except HTTPError as error:  # of the client below, which reaches nothing
        raise ConnectionError(
            f"The hub cannot be reached for {name!r} ({error}): connect, and try again."
        ) from error


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    facts: Mapping[str, Any] | None = None,
    api: HfApi | None = None,
) -> str:
    """Publishes an adapter or a model; a README.md is generated where the folder has none.

    Args:
        folder: of an adapter or a model.
        name: `org/name` on the hub; the repository is made if there is none.
        private: whether a new repository is private.
        revision: branch to commit to, made if missing; None for main.
        message: of the commit.
        facts: for the card; None takes what the folder tells (`card.read_facts`).
        api: how to reach the hub.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: no such folder, or nothing to publish in it.
        ValueError: there are pickles in it, or safetensors that are not whole.
        PermissionError: not logged in, or not allowed.
        ConnectionError: the hub cannot be reached.
    """
    folder = Path(folder)
    check_publishable(folder, name)
    card = None
    if not (folder / CARD).is_file():
        card = model_card(name, read_facts(folder) if facts is None else facts)
    api = HfApi() if api is None else api
    with plain_words(name, revision):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        if card is not None:
            api.upload_file(
                path_or_fileobj=card.encode(),
                path_in_repo=CARD,
                repo_id=name,
                revision=revision,
                commit_message="Model card",
            )
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=name,
            revision=revision,
            commit_message=message or f"Upload {folder.name}",
            # By name: the hub's patterns mean what lies in folders inside, too.
            allow_patterns=sorted({path.name for own in PUBLISHED for path in folder.glob(own)}),
        )
    return str(commit.commit_url)


def check_publishable(folder: Path, name: str) -> None:
    """Refuses what `push` would not upload, without asking the hub.

    Raises:
        FileNotFoundError: `name` is none of the hub's, or there is nothing to publish.
        ValueError: there are pickles in the folder, or safetensors that are not whole.
    """
    with plain_words(name):
        validate_repo_id(name)
    weights = [path for pattern in ("*.safetensors", "*.gguf") for path in folder.glob(pattern)]
    if not weights:
        raise FileNotFoundError(
            f"{folder} holds no safetensors or GGUF file: give the folder of an adapter or a model."
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code on the machine of whoever "
            "loads it: remove it, the safetensors are enough."
        )
    for path in folder.glob("*.safetensors"):
        with open_safetensors(path):
            pass
