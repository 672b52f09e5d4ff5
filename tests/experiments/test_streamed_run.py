"""`finetune --stream-weights` from end to end, on packed rows."""

import json

import pytest

from experiments.finetune import main, make_parser, read_run
from qlora_jax.models import streaming

TINY = (
    "train.steps=2",
    "train.warmup_steps=0",
    "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=1",
    "data.max_rows=12",
    "data.validation_rows=2",
    "data.packing=true",
    "data.packed_length=256",
    "lora.r=2",
    "rouge.limit=2",
    "rouge.max_new_tokens=8",
)
SETTINGS = [word for setting in TINY for word in ("--set", setting)]


def settings_of(*arguments):
    return read_run(make_parser().parse_args(list(arguments))).model


def test_the_flag_recomputes_layers_unless_told_how():
    # The file behind a command without a model keeps everything: remat is "none".
    assert settings_of().remat == "none"
    streamed = settings_of("--stream-weights")
    assert (streamed.stream_weights, streamed.remat) == (True, "full")
    offloading = settings_of("--stream-weights", "--set", "model.remat=offload")
    assert offloading.remat == "offload"


@pytest.mark.slow
def test_a_streamed_run_on_packed_rows_is_the_resident_one(tmp_path, monkeypatch):
    # So that a tiny model's codes stream, as a large one's do.
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 256)

    def results(name, *flags):
        folder = tmp_path / name
        assert main([*flags, *SETTINGS, "--out", str(folder)]) == 0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found = [line.get("loss", line.get("eval_loss")) for line in map(json.loads, lines)]
        assert (folder / "adapter" / "adapter_model.safetensors").exists()
        return found, (folder / "answers.jsonl").read_text()

    resident = results("resident", "--set", "model.remat=full")
    assert len(resident[0]) >= 3
    assert results("streamed", "--stream-weights") == resident
