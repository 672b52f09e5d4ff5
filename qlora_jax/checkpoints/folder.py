"""A Hugging Face model folder, read one tensor at a time.

A folder holds `config.json` and either one `model.safetensors` or shards of it with
`model.safetensors.index.json`, which maps each tensor's name to its shard. Opening a folder reads
headers only, and every check that needs no numbers happens here, before anything is computed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.checkpoints.tensor_file import TensorFile
from qlora_jax.data.json_file import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NO_PICKLE = (
    "a pickle, which can run code and is never read here: convert it once where torch is "
    "installed, with `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, "
    "safe_serialization=True)`."
)
"""What a message says of one."""


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A file's tensors, as `safe_open` gives them; its header is read at once.

    Raises:
        ValueError: it is truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}): fetch it again."
        ) from error


class WeightFolder:
    """The tensors of a model folder, by name.

    Attributes:
        folder: where it lies.
        shapes: every tensor's shape, in the order in which they are best read (shard by shard).
        dtypes: every tensor's dtype, in safetensors' names ("BF16").
    """

    def __init__(self, folder: str | Path, file: str = SINGLE) -> None:
        """Opens a folder and checks its files.

        Args:
            folder: with `model.safetensors`, or shards and their index.
            file: what a single file is called.

        Raises:
            FileNotFoundError: the folder, its weights or one of its shards are missing.
            ValueError: a shard is truncated, the index points outside of the folder or disagrees
                with its shards, or there are only pickle files.
        """
        self.folder = Path(folder)
        self._shard_of = self._locate(file)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file: TensorFile | None = None
        for shard in dict.fromkeys(self._shard_of.values()):
            self._read_header(shard)

    def _locate(self, single: str) -> dict[str, Path]:
        """Tensor name → shard. For a single file, the one key "" until its header is read."""
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is no folder: give the folder of a Hugging Face checkpoint."
            )
        # Where there are both, transformers reads the one file.
        if (self.folder / single).is_file():
            return {"": self.folder / single}
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(
                    f"{self.folder / INDEX} has no weight_map: fetch it again, it names each "
                    "tensor's shard."
                )
            return {name: self._inside(shard) for name, shard in weight_map.items()}
        pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise ValueError(f"{self.folder} holds {pickles[0]}, {NO_PICKLE}")
        raise FileNotFoundError(
            f"{self.folder} holds neither {single} nor {INDEX}: give a folder with safetensors "
            "weights (pickles, such as pytorch_model.bin, are neither read nor fetched)."
        )

    def _inside(self, shard: Any) -> Path:
        plain = isinstance(shard, str) and shard not in ("", ".", "..")
        # One name, no folders, whatever the system's separators are.
        if not plain or PurePosixPath(shard).name != shard or PureWindowsPath(shard).name != shard:
            raise ValueError(
                f"{self.folder / INDEX} names the shard {shard!r}, which is not a file of the "
                "folder itself: an index may not point elsewhere."
            )
        path = self.folder / shard
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, but {INDEX} lists it: fetch the shard into the folder."
            )
        return path

    def _read_header(self, shard: Path) -> None:
        expected = {name for name, path in self._shard_of.items() if path == shard and name}
        with open_safetensors(shard) as file:
            names = file.offset_keys()
            for name in names if not expected else filter(expected.__contains__, names):
                view = file.get_slice(name)
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = view.get_dtype()
                self._shard_of[name] = shard
        self._shard_of.pop("", None)
        absent = sorted(expected - self.shapes.keys())
        if absent:
            raise ValueError(
                f"{shard} lacks {absent[0]!r} and {len(absent) - 1} more tensors that {INDEX} "
                "promises there: fetch both again, of one revision."
            )

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers, copied out of its file (bfloat16 as `ml_dtypes.bfloat16`)."""
        shard = self._shard_of[name]
        if self._file is None or self._file.path != shard:
            self._file = TensorFile(shard)
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        """Names, shard by shard."""
        return iter(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes
