"""Publishing, against a stand-in for the hub: no network in tests."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from qlora_jax.checkpoints import model_card, push
from qlora_jax.checkpoints.card import read_facts
from tests.checkpoints.tiny import change_config
from tests.test_pretrained import hub_error


class StandIn(HfApi):
    """What `push` uses of HfApi, written down instead of sent."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.failure = failure
        for name in ("create_repo", "create_branch", "upload_file", "upload_folder"):
            setattr(self, name, functools.partial(self._call, name))

    def _call(self, method: str, *args, **options):
        if self.failure is not None:
            raise self.failure
        self.calls.append((method, options | ({"name": args[0]} if args else {})))
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def named(self, name: str) -> dict:
        return next(options for called, options in self.calls if called == name)


@pytest.fixture
def run(tmp_path):
    """A finished run, as experiments leave it."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    weights = {"lora_A": np.zeros((2, 2), np.float32)}
    save_file(weights, folder / "adapter" / "adapter_model.safetensors")
    config = {"base_model_name_or_path": "/root/cache/x", "r": 64, "lora_alpha": 16}
    config["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    run_config = {
        "train": {"steps": 30, "learning_rate": 2e-4},
        "run": {
            "model": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "data": {"source": "tatsu-lab/alpaca", "format": "alpaca | or not"},
            "quant": {"quant_type": "nf4"},
            "lora": {"r": 64},
        },
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
    }
    (folder / "config.json").write_text(json.dumps(run_config))
    result = {
        "before": {"loss": 2.5423, "perplexity": 12.7091},
        "after": {"loss": 2.1091, "perplexity": 8.2408},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "device": "cpu",
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_the_card_tells_base_data_hyperparameters_metrics_and_environment(run):
    text = model_card("me/adapter", read_facts(run / "adapter"))
    card = ModelCard(text)  # the hub's own parser
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.datasets == ["tatsu-lab/alpaca"]
    assert card.data.library_name == "peft"
    assert "qlora" in card.data.tags
    for line in [
        "# adapter",
        'model = PeftModel.from_pretrained(base, "me/adapter")',
        "- `tatsu-lab/alpaca`",
        "| r | 64 |",
        "| target_modules | q_proj, v_proj |",
        "| learning_rate | 0.0002 |",
        "| data.format | alpaca \\| or not |",
        "| quant.quant_type | nf4 |",
        "| before.perplexity | 12.7091 |",
        "| after.loss | 2.1091 |",
        "| jax | 0.10.2 |",
        "| device | cpu |",
    ]:
        assert line in text.splitlines()
    assert "lora.r" not in text, "the adapter says it"


def test_the_card_of_a_folder_alone(run, tmp_path):
    alone = tmp_path / "alone"
    (run / "adapter").rename(alone)
    text = model_card("me/adapter", read_facts(alone))
    assert "## Hyperparameters" not in text
    for folder in (None, "./base", "/models/base"):
        text = model_card("me/adapter", read_facts(alone) | {"base": folder})
        assert ModelCard(text).data.base_model is None, "a folder of the author's is no hub name"


def test_the_card_names_adapted_parameters(run):
    change_config(
        run / "adapter", file="adapter_config.json", target_parameters=["experts.down_proj"]
    )
    text = model_card("me/adapter", read_facts(run / "adapter"))
    assert "| target_parameters | experts.down_proj |" in text


def test_push_uploads_the_folder_and_a_card(run):
    for name in (
        "optimizer.py",
        "checkpoint-5/adapter_model.safetensors",
        "checkpoint-5/state.json",
    ):
        (run / "adapter" / name).parent.mkdir(exist_ok=True)
        (run / "adapter" / name).touch()
    api = StandIn()
    url = push(run / "adapter", "me/adapter", private=True, revision="v1", api=api)
    assert url == "https://hub/commit/1"
    assert api.named("create_repo") == {"name": "me/adapter", "private": True, "exist_ok": True}
    assert api.named("create_branch")["branch"] == "v1"
    card = api.named("upload_file")
    assert b"SmolLM2" in card["path_or_fileobj"]
    assert (card["repo_id"], card["path_in_repo"], card["revision"]) == (
        "me/adapter", "README.md", "v1",
    )  # fmt: skip
    upload = api.named("upload_folder")
    assert (upload["repo_id"], upload["revision"]) == ("me/adapter", "v1")
    kept = {"adapter_config.json", "adapter_model.safetensors"}
    files = [
        str(f.relative_to(run / "adapter")) for f in (run / "adapter").rglob("*") if f.is_file()
    ]
    assert set(filter_repo_objects(files, allow_patterns=upload["allow_patterns"])) == kept


def test_a_card_that_is_there_is_kept(run):
    (run / "adapter" / "README.md").write_text("mine")
    api = StandIn()
    push(run / "adapter", "me/adapter", api=api)
    assert [name for name, _ in api.calls] == ["create_repo", "upload_folder"]
    assert (run / "adapter" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (errors.LocalTokenNotFoundError("none"), PermissionError, "needs an account: log in"),
        (hub_error(errors.HfHubHTTPError), ConnectionError, "did not give 'me/adapter'"),
        (errors.HTTPError("no route"), ConnectionError, "cannot be reached for 'me/adapter'"),
        (errors.HFValidationError("bad"), FileNotFoundError, "hub name of the form org/name"),
    ],
)
def test_what_the_hub_answers_in_plain_words(run, failure, raised, message):
    with pytest.raises(raised, match=message):
        push(run / "adapter", "me/adapter", api=StandIn(failure))


@pytest.mark.parametrize(
    ("facts", "auto", "task"),
    [
        ({"adapter": {"task_type": "SEQ_CLS"}}, "SequenceClassification", "text-classification"),
        ({"adapter": {"task_type": "SEQ_2_SEQ_LM"}}, "Seq2SeqLM", "text2text-generation"),
        ({"adapter": {"task_type": "CAUSAL_LM"}}, "CausalLM", "text-generation"),
        ({"adapter": {"r": 2}}, "CausalLM", "text-generation"),
        (
            {"model": {"architectures": ["T5ForConditionalGeneration"]}},
            "Seq2SeqLM",
            "text2text-generation",
        ),
        (
            {"model": {"architectures": ["RobertaForSequenceClassification"]}},
            "SequenceClassification",
            "text-classification",
        ),
    ],
)
def test_the_card_loads_the_model_in_its_own_class(facts, auto, task):
    text = model_card("me/it", facts)
    assert f"AutoModelFor{auto}.from_pretrained" in text
    assert ModelCard(text).data.pipeline_tag == task


def test_a_file_that_is_not_whole_is_not_published(run):
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    api = StandIn()
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        push(run / "adapter", "me/adapter", api=api)
    assert not api.calls


def test_nothing_to_publish_and_pickles(run):
    api = StandIn()
    with pytest.raises(FileNotFoundError, match="holds no safetensors or GGUF file"):
        push(run, "me/adapter", api=api)
    (run / "adapter" / "optimizer.pt").touch()
    with pytest.raises(ValueError, match=r"holds optimizer.pt, a pickle"):
        push(run / "adapter", "me/adapter", api=api)
    assert not api.calls
