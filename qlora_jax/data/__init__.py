"""Instruction datasets: from rows to batches.

The journey of an example, each step one file:

    load_rows (sources)      file or hub name -> rows
    FORMATS (templates)      row -> text segments, each trained on or not
    load_chat_template       the same by a model's own Jinja template
    load_instruct            both at once for the eight datasets of the paper
    load_tokenizer           model folder -> Tokenizer
    tokenize_rows            rows -> Examples: token ids and labels
    Batches                  Examples -> Batch of a fixed shape, for any step of the run

Everything here is NumPy on the host; nothing needs JAX.
"""

from qlora_jax.data.batches import Batch, Batches, length_buckets
from qlora_jax.data.chat_format import ChatTemplateFormat
from qlora_jax.data.chat_template import ChatTemplate, load_chat_template
from qlora_jax.data.classification import (
    ClassificationBatch,
    ClassificationBatches,
    Labelled,
    tokenize_texts,
)
from qlora_jax.data.examples import IGNORE, Example, Examples, TokenizeReport
from qlora_jax.data.instruct import INSTRUCT, InstructDataset, InstructRows, load_instruct
from qlora_jax.data.packing import PackedBatch, PackedBatches
from qlora_jax.data.segments import Format, Segment
from qlora_jax.data.seq2seq import Pair, Pairs, Seq2SeqBatch, Seq2SeqBatches, tokenize_pairs
from qlora_jax.data.sources import load_rows
from qlora_jax.data.templates import (
    FORMATS,
    ChatStyle,
    ConversationFormat,
    FlatChatFormat,
    InstructionFormat,
    PairFormat,
    TextFormat,
    check_columns,
    detect_format,
    formats_for,
    get_format,
)
from qlora_jax.data.tokenize import tokenize_rows
from qlora_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "FORMATS",
    "IGNORE",
    "INSTRUCT",
    "Batch",
    "Batches",
    "ChatStyle",
    "ChatTemplate",
    "ChatTemplateFormat",
    "ClassificationBatch",
    "ClassificationBatches",
    "ConversationFormat",
    "Example",
    "Examples",
    "FlatChatFormat",
    "Format",
    "InstructDataset",
    "InstructRows",
    "InstructionFormat",
    "Labelled",
    "PackedBatch",
    "PackedBatches",
    "Pair",
    "PairFormat",
    "Pairs",
    "Segment",
    "Seq2SeqBatch",
    "Seq2SeqBatches",
    "TextFormat",
    "TokenizeReport",
    "Tokenizer",
    "check_columns",
    "detect_format",
    "formats_for",
    "get_format",
    "length_buckets",
    "load_chat_template",
    "load_instruct",
    "load_rows",
    "load_tokenizer",
    "tokenize_pairs",
    "tokenize_rows",
    "tokenize_texts",
]
