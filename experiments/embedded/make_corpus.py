"""Freeze Python's standard library into a corpus, three instruction datasets and a tokenizer.

    python -m experiments.embedded.make_corpus [--out FOLDER]

Why frozen: the standard library differs by Python version, and a finetune is only comparable with
another one on the same rows. The committed files were made with CPython 3.11.7; rerunning the
script there gives the same bytes, and on another version a similar corpus.

How the text is divided, by a hash of the file's path, so that nothing depends on file order:

    pretrain   70 % of the files, the language reference and the C modules' docstrings
    finetune   20 % of the files: the `train` rows of the three datasets
    held_out   10 % of the files: the `validation` rows, and the pretraining's held-out loss

The base models have therefore seen no function of any dataset. Libraries copy from themselves, so
a row is also dropped where its code or its answer occurs in an earlier part (in full text, white
space aside): a validation row in neither the pretraining nor the finetuning text, a training row
not in the pretraining text.

The datasets, one per form that `qlora_jax.data` reads:

    describe   Alpaca's columns: code of a function -> the first sentence of its docstring
    implement  input and output: signature and docstring -> body
    chat       messages: what does it do? which arguments does it take? where is it?

The text is the Python Software Foundation's (see README.md in this folder for the licence).
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib
import inspect
import io
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.embedded import ROOT

SKIPPED_FOLDERS = {
    "site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "lib-dynload",
    "pydoc_data", "__phello__", "turtledemo",
}  # fmt: skip
C_MODULES = (
    "builtins", "_io", "_collections", "_functools", "_operator", "_random", "_struct", "array",
    "binascii", "bz2", "cmath", "errno", "faulthandler", "gc", "itertools", "marshal", "math",
    "mmap", "posix", "pyexpat", "select", "_socket", "_ssl", "_hashlib", "sys", "time",
    "unicodedata", "zlib", "_thread", "_weakref", "_datetime", "_json", "_csv", "_heapq",
    "_bisect", "_codecs", "_ast", "_asyncio", "_pickle", "_queue", "_signal", "_string",
)  # fmt: skip
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
MAX_CODE_CHARACTERS = 360
MAX_BODY_CHARACTERS = 280
MAX_SUMMARY_CHARACTERS = 140


@dataclass(frozen=True)
class Document:
    """One text of the corpus: a source file, a page of the reference, a module's docstrings."""

    path: str
    split: str  # "pretrain", "finetune" or "held_out"
    text: str


@dataclass(frozen=True)
class Function:
    """One documented function, as the datasets need it."""

    module: str
    name: str
    signature: str  # "def merge(*iterables, key=None):"
    docstring: str
    summary: str  # the docstring's first sentence
    body: str  # without the docstring, dedented
    arguments: tuple[tuple[str, str | None], ...]  # name (with its stars), default as source

    @property
    def code(self) -> str:
        """Signature and body, without the docstring."""
        return self.signature + "\n" + textwrap.indent(self.body, "    ")


def split_of(path: str) -> str:
    """The part of the corpus that a path belongs to, the same on every machine."""
    percent = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) % 100
    return "held_out" if percent < 10 else "finetune" if percent < 30 else "pretrain"


def squeezed(text: str) -> str:
    """Text without white space: how copies are recognised when indentation differs."""
    return re.sub(r"\s+", "", text)


# --------------------------------------------------------------------------- the corpus


def source_documents(library: Path) -> Iterator[Document]:
    """The library's Python files, tables of numbers left out."""
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library).as_posix()
        folders = set(path.split("/")[:-1])
        if folders & SKIPPED_FOLDERS or any(f.startswith("config-") for f in folders):
            continue
        if path.startswith("_sysconfigdata"):  # this machine's compiler flags
            continue
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        words = sum(c.isalpha() or c.isspace() for c in text)
        if len(text) > 100 and words > 0.65 * len(text):
            yield Document(path, split_of(path), text)


def reference_documents() -> Iterator[Document]:
    """The language reference that `help()` shows, and the docstrings of the C modules."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield Document(f"topics/{name}.rst", "pretrain", topics[name].strip())
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not every build has every C module
            continue
        text = "\n\n".join(_c_docstrings(module))
        if len(text) > 100:
            yield Document(f"builtin/{name}.txt", "pretrain", text)


def _c_docstrings(module: Any) -> Iterator[str]:
    for owner in [module, *(v for _, v in sorted(vars(module).items()) if inspect.isclass(v))]:
        for name, value in sorted(vars(owner).items()):
            doc = getattr(value, "__doc__", None)
            if not callable(value) or not isinstance(doc, str) or name.startswith("__"):
                continue
            signature = getattr(value, "__text_signature__", None) or "(...)"
            yield f"def {name}{signature}:\n" + textwrap.indent(
                f'"""{inspect.cleandoc(doc)}\n"""', "    "
            )


def make_documents(library: Path) -> list[Document]:
    """The whole corpus, each text once, held-out texts first so that a copy never hides them."""
    order = {"held_out": 0, "finetune": 1, "pretrain": 2}
    documents = [*source_documents(library), *reference_documents()]
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda d: (order[d.split], d.path)):
        key = squeezed(document.text)
        if key not in seen:
            seen.add(key)
            kept.append(document)
    return kept


# --------------------------------------------------------------------------- the datasets


def functions_of(document: Document) -> Iterator[Function]:
    """The documented functions and methods of a source file, as it orders them."""
    if not document.path.endswith(".py"):
        return
    try:
        tree = ast.parse(document.text)
    except SyntaxError:  # lib2to3 and others keep Python 2 files as data
        return
    module = document.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or node.name.startswith("__"):
            continue
        summary = _first_sentence(docstring)
        if summary is None:
            continue
        bare = ast.unparse(ast.FunctionDef(
            name=node.name, args=node.args, body=[ast.Pass()], decorator_list=[],
            returns=node.returns, lineno=1, type_comment=None,
        ))  # fmt: skip
        signature = bare.rsplit("\n", 1)[0]
        if isinstance(node, ast.AsyncFunctionDef):
            signature = "async " + signature
        yield Function(
            module=module,
            name=node.name,
            signature=signature,
            docstring=docstring,
            summary=summary,
            body="\n".join(ast.unparse(statement) for statement in node.body[1:]),
            arguments=tuple(_arguments(node.args)),
        )


def _first_sentence(docstring: str) -> str | None:
    """The first sentence on one line, where it is a sentence of a fit length, else None."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = re.match(r".+?[.](?=\s+[A-Z(]|$)", paragraph)  # not at the stops of "a.k.a. this"
    sentence = match.group(0) if match else paragraph + "."
    fits = 15 <= len(sentence) <= MAX_SUMMARY_CHARACTERS
    return sentence if fits and sentence[0].isupper() and sentence.isascii() else None


def _arguments(arguments: ast.arguments) -> Iterator[tuple[str, str | None]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    for argument, default in zip(positional, [*missing, *arguments.defaults], strict=True):
        if argument.arg not in ("self", "cls"):
            yield argument.arg, None if default is None else ast.unparse(default)
    if arguments.vararg:
        yield "*" + arguments.vararg.arg, None
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield argument.arg, None if default is None else ast.unparse(default)
    if arguments.kwarg:
        yield "**" + arguments.kwarg.arg, None


def describe_row(function: Function) -> dict[str, Any] | None:
    """Alpaca's columns: what does this code do?"""
    if len(function.code) > MAX_CODE_CHARACTERS:
        return None
    return {
        "instruction": "Describe what this Python function does in one sentence.",
        "input": function.code,
        "output": function.summary,
    }


def implement_row(function: Function) -> dict[str, Any] | None:
    """Input and output: the body that fits a signature and a docstring."""
    if len(function.body) > MAX_BODY_CHARACTERS:
        return None
    head = f'{function.signature}\n    """{function.summary}"""\n'
    return {"input": head, "output": textwrap.indent(function.body, "    ")}


def chat_row(function: Function) -> dict[str, Any] | None:
    """Messages: a conversation of three questions about one function."""
    if len(function.signature) > MAX_CODE_CHARACTERS // 2:
        return None
    listed = [
        f"`{name}`" + (f" (default `{default}`)" if default is not None else "")
        for name, default in function.arguments
    ]
    *first, last = listed or [""]
    takes = f"{', '.join(first)} and {last}" if first else last
    turns = [
        f"The module `{function.module}` has this function:\n{function.signature}\n"
        "What does it do?",
        function.summary,
        "Which arguments does it take?",
        f"It takes {takes}." if listed else "It takes no arguments.",
        "Where do I find it?",
        f"`{function.name}` is in the module `{function.module}`.",
    ]
    roles = ("user", "assistant") * 3
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]}


ROWS = {"describe": describe_row, "implement": implement_row, "chat": chat_row}


def _keys(function: Function) -> set[str]:
    return {squeezed(function.body), squeezed(function.summary.rstrip("."))}


def make_datasets(documents: Iterable[Document]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """`{dataset: {"train": rows, "validation": rows}}`, free of overlaps as the module promises."""
    documents = list(documents)
    earlier = squeezed("\n".join(d.text for d in documents if d.split == "pretrain"))
    # Both the text as written and the code as unparsed (no comments, one quoting style) count.
    seen = {
        key
        for document in documents
        if document.split == "pretrain"
        for function in functions_of(document)
        for key in _keys(function)
    }
    datasets: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in ROWS}
    for part, split in (("train", "finetune"), ("validation", "held_out")):
        functions: list[Function] = []
        for document in (d for d in documents if d.split == split):
            for function in functions_of(document):
                keys = _keys(function)
                if keys & seen or any(key in earlier for key in keys):
                    continue
                seen |= keys
                functions.append(function)
        # A fixed order that mixes the modules; `train` on the first n rows is then a fair sample.
        functions.sort(key=lambda f: hashlib.sha256(f"{f.module}.{f.code}".encode()).digest())
        for name, make_row in ROWS.items():
            datasets[name][part] = [row for row in map(make_row, functions) if row is not None]
        earlier += squeezed("\n".join(d.text for d in documents if d.split == split))
    return datasets


# --------------------------------------------------------------------------- files


def train_tokenizer(texts: Iterable[str]) -> str:
    """A byte-level BPE in `tokenizer.json` form; the texts decide its merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As Llama's tokenizers do: a sequence begins with <s>, the end is the trainer's to add.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return tokenizer.to_str(pretty=False)


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line; gzip where the name ends so, with no time in it."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
            file.write(text)
        text = buffer.getvalue()
    path.write_bytes(text)


def read_corpus(path: Path = ROOT / "corpus" / "stdlib.jsonl.gz") -> list[Document]:
    """The frozen corpus."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def main(arguments: list[str] | None = None) -> None:
    """Write `corpus/`, `datasets/` and `tokenizer/` under `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.embedded.make_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT, help="folder (default: this package's)")
    out = parser.parse_args(arguments).out
    documents = make_documents(Path(sysconfig.get_path("stdlib")))
    write_jsonl(out / "corpus" / "stdlib.jsonl.gz", map(vars, documents))
    for split in ("pretrain", "finetune", "held_out"):
        texts = [d.text for d in documents if d.split == split]
        print(f"corpus {split}: {len(texts)} texts, {sum(map(len, texts)) / 1e6:.2f} MB")
    for name, parts in make_datasets(documents).items():
        for part, rows in parts.items():
            write_jsonl(out / "datasets" / name / f"{part}.jsonl", rows)
            print(f"dataset {name} {part}: {len(rows)} rows")
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    texts = [d.text for d in documents if d.split == "pretrain"]
    (out / "tokenizer" / "tokenizer.json").write_text(train_tokenizer(texts), encoding="utf-8")
    config = json.dumps(TOKENIZER_CONFIG, indent=1) + "\n"
    (out / "tokenizer" / "tokenizer_config.json").write_text(config, encoding="utf-8")
    print(f"made with CPython {sys.version.split()[0]} in {out}")


if __name__ == "__main__":
    main()
