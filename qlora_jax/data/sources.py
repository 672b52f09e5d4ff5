"""Rows of a dataset, from a file, a folder or the Hugging Face hub, through `datasets`.

`datasets` reads every format into memory-mapped Arrow files in its cache, so a set of millions of
rows costs no memory here; what comes back is its `Dataset`: a sequence of dicts.

What is a path and what is a hub name is never guessed from the network: whatever exists locally is
local, only `owner/name` can be a hub name, and something that looks like a path and does not exist
is an error. Datasets that are programs (loading scripts) are never run: `datasets` 4 and later do
not know how to, and `trust_remote_code` is not passed.
"""

import bz2
import codecs
import gzip
import lzma
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.data.json_file import read_json

# `datasets` takes two seconds to import: only those who read a dataset pay them.
if TYPE_CHECKING:
    import datasets

# File ending -> the packaged reader of `datasets`.
_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# What `Dataset.save_to_disk` writes beside its Arrow files.
_SAVED = ("state.json", "dataset_info.json")
# File ending -> what opens a compressed file.
_COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PREFIX = "hub:"


def load_rows(
    source: str | Path,
    split: str | None = None,
    *,
    name: str | None = None,
    data_files: str | list[str] | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> "datasets.Dataset":
    """The rows of a dataset, each a dict from column to value.

    A slice `rows[:500]` is no rows but a dict of columns, as of every `datasets.Dataset`: take
    `split="train[:500]"`, or `rows.select(range(500))`.

    Args:
        source: a file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt, each also .gz, .bz2,
            .xz), a folder of such files or one that `Dataset.save_to_disk` wrote, or a hub name
            "owner/name" ("hub:owner/name" where a local folder of the first name is in the way).
        split: which split, slices included ("train", "test", "train[:500]", "train[90%:]"). A file
            is one split, "train". None: the only split there is, or "train".
        name: the configuration of the hub dataset or folder, where it has several.
        data_files: read only these files of the hub dataset or folder.
        columns: by the name that a prompt format knows, what the dataset calls a column:
            {"messages": "conversations"}. One that has the format's name already gives way.
        revision: the hub dataset's branch, tag or commit.
        cache_dir: where `datasets` keeps its Arrow files; None: its own default (HF_HOME).

    Raises:
        FileNotFoundError: a path that does not exist, a hub dataset that does not exist.
        ConnectionError: the hub cannot be reached and the dataset is not in the cache.
        ValueError: a file that cannot be read, an unknown split, no rows, no such column.
        TypeError: source is neither a text nor a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source is a {type(source).__name__}, but a file, a folder or a hub name is needed: "
            "rows that are at hand go to tokenize_rows as they are."
        )
    text = os.fspath(source)
    hub_name = _hub_name(text)
    cache = None if cache_dir is None else os.fspath(cache_dir)
    if hub_name is not None:
        rows = _load_hub(
            hub_name, split, name=name, data_files=data_files, revision=revision, cache_dir=cache
        )
    else:
        if revision is not None:
            raise ValueError(f"{text} is local: revision belongs to a hub dataset.")
        path = Path(text).expanduser()
        rows = _load_local(path, split, name=name, data_files=data_files, cache_dir=cache)
    if len(rows) == 0:
        raise ValueError(_empty(text, split))
    return _renamed(rows, columns, text) if columns else rows


def _renamed(
    rows: "datasets.Dataset", columns: Mapping[str, str], source: str
) -> "datasets.Dataset":
    """The rows with columns under other names: new name -> the dataset's."""
    has, wanted = rows.column_names, list(columns.values())
    for column in wanted:
        if column not in has:
            raise ValueError(f"{source} has no column {column!r}, but {', '.join(has)}.")
        if wanted.count(column) > 1:
            raise ValueError(f"the column {column!r} of {source} cannot have two names.")
    in_the_way = [name for name in columns if name in has and name not in wanted]
    names = {theirs: name for name, theirs in columns.items()}
    return rows.remove_columns(in_the_way).rename_columns(names)


def _empty(source: str, split: str | None) -> str:
    return f"{source} (split {split or 'train'}) is empty: there is not one row in it."


def _hub_name(source: str) -> str | None:
    """The hub name that `source` means, None for a local path that exists; else refuses."""
    if source.startswith(_HUB_PREFIX):
        name = source.removeprefix(_HUB_PREFIX)
        if not _HUB_NAME.fullmatch(name):
            raise ValueError(f"{source!r} is no hub name: expected {_HUB_PREFIX}owner/name.")
        return name
    path = Path(source).expanduser()
    if path.exists():
        return None
    suffixes = {suffix.lower() for suffix in path.suffixes}
    looks_like_file = not suffixes.isdisjoint({*_READERS, *_COMPRESSIONS})
    if looks_like_file or not _HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"{source} does not exist: expected a file ({', '.join(_READERS)}, perhaps "
            "compressed), a folder of such files, or a hub name of the form owner/name."
        )
    if path.parent.exists():
        raise FileNotFoundError(
            f"{source} does not exist, though the folder {path.parent} does; if the hub dataset of "
            f"that name is meant, write {_HUB_PREFIX}{source}."
        )
    return source


def _load_local(
    path: Path,
    split: str | None,
    *,
    name: str | None,
    data_files: str | list[str] | None,
    cache_dir: str | None,
) -> "datasets.Dataset":
    import datasets
    import pyarrow

    options: dict[str, Any] = {}
    if all((path / saved).is_file() for saved in _SAVED):
        reader, options["data_files"] = "arrow", _saved_files(path)
    elif path.is_dir():
        reader, options["name"], options["data_files"] = str(path), name, data_files
    else:
        if name is not None:
            raise ValueError(
                f"{path} is a file, which has no configuration {name!r}: leave it out."
            )
        ending = _ending(path)
        reader, options["data_files"] = _READERS[ending], str(path)
        if ending == ".tsv":
            options["sep"] = "\t"
        if path.stat().st_size == 0:
            raise ValueError(_empty(str(path), split))
    try:
        builder = datasets.load_dataset_builder(reader, cache_dir=cache_dir, **options)
        options |= _more_options(builder)
        with _quietly(), _whole_lines():
            rows = _one_split(
                datasets.load_dataset(reader, split=split, cache_dir=cache_dir, **options),
                str(path),
            )
        # Text that is not UTF-8 passes the JSON reader, to fail only where a row is looked at.
        rows.data.validate(full=True)
        return rows
    except (
        datasets.exceptions.DatasetGenerationError,
        pyarrow.ArrowException,
        OSError,  # a folder without data files, a file that is not compressed as its name says
        EOFError,  # a compressed file cut short, and damaged ones
        lzma.LZMAError,
        zlib.error,
        ValueError,
    ) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(_empty(str(path), split)) from error
        raise ValueError(
            f"{path} cannot be read as a dataset{'' if split is None else f' (split {split!r})'}: "
            f"{_reason(error)}"
        ) from error


def _saved_files(folder: Path) -> list[str]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote: none outside of it.

    Raises:
        ValueError: its list of them is damaged.
    """
    listed = read_json(folder / _SAVED[0]).get("_data_files")
    found: list[str] = []
    for entry in listed if isinstance(listed, list) else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{folder / _SAVED[0]} lists {name!r} among its files, but the name of one in the "
                "folder is needed: save the dataset again."
            )
        found.append(str(folder / name))
    return found


def _begins_with_null(path: Path) -> bool:
    """What pyarrow's JSON reader dies of."""
    with _COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
        return bool(file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"null"))


def _more_options(builder: "datasets.DatasetBuilder") -> dict[str, Any]:
    """What the reader of local files has to be told besides, by what is in them.

    Raises:
        ValueError: pyarrow's JSON reader would die of a file, and the process with it.
    """
    config = builder.config
    files = [Path(file) for files in (config.data_files or {}).values() for file in files]
    if builder.name == "json":
        for file in filter(_begins_with_null, files):
            raise ValueError(
                f"{file.name} begins with null, but rows are JSON objects, a line each or listed."
            )
    # What a folder's README says of its columns stands.
    if builder.name == "csv" and files and builder.info.features is None:
        return _cells_as_text(files[0], config.sep)
    return {}


def _cells_as_text(path: Path, separator: str) -> dict[str, Any]:
    """Options of the CSV reader, which else makes 7 of an answer 007, and nothing of one NA."""
    import datasets
    import pandas

    columns = pandas.read_csv(path, sep=separator, nrows=0).columns
    features = datasets.Features({str(name): datasets.Value("string") for name in columns})
    # Otherwise pandas makes names of rows of the first cells, where lines have one too many.
    return {"features": features, "keep_default_na": False, "index_col": False}


@contextmanager
def _whole_lines() -> Iterator[None]:
    """Refuses lines of a CSV file that have more cells than its first, which pandas warns of."""
    import datasets
    import pandas

    with warnings.catch_warnings():
        message = "Length of header or names does not match length of data"
        warnings.filterwarnings("error", message, pandas.errors.ParserWarning)
        try:
            yield
        except (datasets.exceptions.DatasetGenerationError, pandas.errors.ParserWarning) as error:
            if message not in _reason(error):
                raise
            raise ValueError(
                "a line has more cells than the first, which names the columns: put quotation "
                "marks around cells that hold a separator."
            ) from None


def _load_hub(
    hub_name: str, split: str | None, *, cache_dir: str | None, **options: Any
) -> "datasets.Dataset":
    import datasets

    try:
        return _one_split(
            datasets.load_dataset(hub_name, split=split, cache_dir=cache_dir, **options), hub_name
        )
    # A missing dataset is a FileNotFoundError to `datasets`, an unreachable hub an OSError.
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"the hub has no dataset {hub_name!r} that you may read: check the name, or log in "
            "(hf auth login) if it is gated."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"the dataset {hub_name!r} is not in the cache and the hub cannot be reached: connect "
            "to the network, or download the files elsewhere and give their path."
        ) from error
    except (datasets.exceptions.DatasetGenerationError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the hub dataset {hub_name!r} cannot be read: {_reason(error)}"
        ) from error


def _ending(path: Path) -> str:
    """What tells a file's format: a key of `_READERS`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _READERS:
        raise ValueError(
            f"{path} has no ending that tells its format: expected {', '.join(_READERS)}, perhaps "
            f"followed by {', '.join(_COMPRESSIONS)}."
        )
    return suffixes[-1]


def _one_split(loaded: Any, source: str) -> "datasets.Dataset":
    """The dataset itself, or of several splits the only one or "train"."""
    if not isinstance(loaded, dict):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    if "train" in loaded:
        return loaded["train"]
    raise ValueError(f"{source} has the splits {', '.join(loaded)}: say which (split=...).")


def _reason(error: BaseException) -> str:
    """The innermost cause, in its own words, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars of `datasets`, as a local file takes less time than reading them,
    and without its own account of an error, which its caller tells."""
    import datasets

    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
