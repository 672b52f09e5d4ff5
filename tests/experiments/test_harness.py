"""The command of lm-evaluation-harness: what it refuses before a model is read, what it keeps."""

import json

import pytest

from experiments import harness
from experiments.answering import adapter_digest
from qlora_jax.checkpoints import load_model, save_adapter
from qlora_jax.nn import LoraConfig

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "no_such_task"], "--tasks no_such_task: Spec 'no_such_task' is not a"),
        (["--tasks", "broken.yaml"], "--tasks broken.yaml: "),
        (["--tasks", "arc_easy", "--include", "nowhere"], "there is no such folder"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit is 0, but 1 or more is needed"),
        (["--tasks", "arc_easy", "--shots", "-1"], "--shots is -1, but 0 or more is needed"),
    ],
)
def test_bad_input(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: [")
    assert harness.main(["stdlib-1m", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert not (tmp_path / "runs").exists()


def test_results_of_each_adapter_are_kept_apart(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": "Tom ran", "c": ["home", "zebra"], "a": 0}\n' * 2)
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{c}}'\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n"
    )
    lora = LoraConfig(r=2)
    save_adapter("adapter", load_model(tiny_model, lora=lora), lora, "tiny")
    command = [str(tiny_model), "--tasks", "tiny_choice", "--include", str(tmp_path)]
    command += ["--compute-dtype", "float32", "--limit", "1", "--max-len", "32"]
    assert harness.main(command) == 0
    assert harness.main([*command, "--adapter", "adapter"]) == 0
    digest = adapter_digest(tmp_path / "adapter")
    found = {
        file.parent.name: json.loads(file.read_text())
        for file in (tmp_path / "runs" / "harness").glob("*/harness.json")
    }
    assert found.keys() == {"tiny", f"tiny-{digest[:8]}"}
    assert [told["adapter"] for _, told in sorted(found.items())] == [None, digest]
    for told in found.values():
        assert (told["limit"], told["shots"], told["max_len"]) == (1, None, 32)
        assert told["results"]["tiny_choice"]["acc,none"] in (0, 1)
