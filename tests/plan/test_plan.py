"""Plans of a tiny model: on this machine's CPU, and for cards that are not here."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from pallas_kernels.cards import CARDS
from qlora_jax.cli import main
from qlora_jax.evaluate import loss_for, split_adapters
from qlora_jax.models.stream_cost import stream_cost
from qlora_jax.models.streaming import HOST_LIMIT, host_limit_for
from qlora_jax.nn import LoraConfig, TrainedParam
from qlora_jax.plan import Workload, advice, check_fits, compiled, find_config, measure, plan
from qlora_jax.plan.advice import SWITCHES, advise
from qlora_jax.plan.compiled import CACHE_VARIABLE, cache_folder, cudnn_available
from qlora_jax.plan.measure import random_batch, random_weights
from qlora_jax.plan.memory import Components, Plan
from qlora_jax.plan.report import Streaming, report, text
from qlora_jax.plan.workload import model_shapes, training_step
from qlora_jax.quant import QuantConfig
from qlora_jax.train import HostTraffic, TrainConfig, host_traffic
from tests.memory.goals import needs_compiler

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TINY_T5 = {
    "model_type": "t5",
    "vocab_size": 256,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 2,
}
ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 34,
}
WORK = Workload(
    find_config(TINY), sequence=32, train=TrainConfig(micro_batch_size=1), lora=LoraConfig(r=4)
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    """One for all tests here, so that each program is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("plans")))
        yield


def test_components_add_up_to_the_compilers_total():
    made = plan(WORK)
    parameters = 2 * 4 * (4 * (128 + 128) + 3 * (128 + 256))
    assert made.device.adapters == made.device.gradients == 4 * parameters
    assert made.device.optimizer == pytest.approx(8 * parameters, abs=64)
    assert made.device.embeddings == 2 * 2 * 256 * 128
    assert made.device.temporaries > 0
    assert made.memory is None
    assert made.fits is None


def test_sums_of_gradients_are_where_they_rest():
    def gradients(**options):
        train = dataclasses.replace(WORK.train, page_min_size=1, **options)
        return plan(dataclasses.replace(WORK, train=train)).device.gradients

    one = plan(WORK).device.gradients
    assert gradients(gradient_accumulation_steps=2) == 2 * one
    assert gradients(gradient_accumulation_steps=2, gradients_on_host=True) == one


def test_the_answer_is_kept_and_a_damaged_one_is_asked_anew(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    first = plan(WORK)
    (file,) = cache_folder().iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"temporaries": kept["temporaries"] + 1}))
    assert plan(WORK).device.total == first.device.total + 1
    # Another compiler's is another answer.
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_versions", lambda: ("jax 99",))
        assert plan(WORK).device.total == first.device.total
    file.write_text("{")
    assert plan(WORK).device.total == first.device.total


def test_a_full_disk_keeps_no_answer_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        first = plan(WORK)
    assert list(cache_folder().iterdir()) == []
    assert plan(WORK).device == first.device


def test_a_run_that_does_not_fit_is_refused():
    assert check_fits(WORK) is None  # a CPU does not tell its memory
    greedy = dataclasses.replace(WORK, remat="none")
    needed = check_fits(greedy, memory=2**30).device.total
    assert needed < 2**30
    with pytest.raises(ValueError, match=r"too much.*saves memory: remat: full.*the check off"):
        check_fits(greedy, memory=needed - 1)


def test_the_vocabulary_is_packed_further_and_never_back():
    eight, four = (s for s in SWITCHES if s.name.startswith("embedding_bits"))
    assert eight.apply(WORK).embedding_bits == 8
    assert four.apply(eight.apply(WORK)).embedding_bits == 4
    assert eight.apply(four.apply(WORK)) is None
    # A 16-bit base is an experiment of its own.
    assert eight.apply(dataclasses.replace(WORK, quant=None)) is None


def test_updates_in_the_backward_pass_are_planned_and_advised_where_they_apply():
    (switch,) = (s for s in SWITCHES if s.name.startswith("update_in_backward"))
    paging = dataclasses.replace(WORK.train, page_min_size=1)
    work = dataclasses.replace(WORK, train=paging)
    found, ordinary = plan(switch.apply(work)), plan(work)
    assert found.work.train.max_grad_norm is None
    # One of two layers; as many bytes cross the bus, layer by layer.
    assert 2 * found.device.gradients == ordinary.device.gradients
    assert found.traffic == ordinary.traffic
    assert found.traffic.paged_state.to_device > 0
    for changes in ({"gradient_accumulation_steps": 2}, {"optim": "adamw_8bit"}):
        train = dataclasses.replace(WORK.train, **changes)
        assert switch.apply(dataclasses.replace(WORK, train=train)) is None
    assert switch.apply(dataclasses.replace(WORK, remat="none")) is None
    assert switch.apply(found.work) is None


def test_products_are_kept_of_a_packed_base_as_of_a_dense_one():
    def saved(remat, quant):
        work = dataclasses.replace(WORK, remat=remat, quant=quant, attention="chunked")
        return training_step(work).saved

    quant, config = WORK.quant, WORK.config
    assert saved("dots", quant) == saved("dots", None)
    # All but the last linear layer's, whose product is only added.
    outputs = 5 * config.hidden_size + 2 * config.intermediate_size - config.hidden_size
    more = saved("dots", quant) - saved("full", quant)
    assert more >= 2 * WORK.sequence * outputs * config.num_hidden_layers
    assert saved("none", quant) > saved("dots", quant) > saved("attention", quant)


def test_the_planned_step_runs():
    found = measure(WORK, steps=1)
    assert np.isfinite(found.first_loss)
    assert found.tokens_per_second > 0


@pytest.mark.slow
def test_a_load_holds_what_is_written_beside_what_is_there():
    found = report("tiny", WORK, search=False)
    made, config = found.plan.device, WORK.config
    resident = made.base + made.embeddings + made.adapters
    # The largest tensor in 16 bits, as the file has it.
    largest = 2 * config.hidden_size * max(config.intermediate_size, config.vocab_size)
    assert resident + largest <= found.load < resident + 20 * largest
    assert found.largest_batch is None


def test_an_encoder_decoder_is_planned():
    work = dataclasses.replace(WORK, config=find_config(TINY_T5))
    assert work.tokens == 32 + 32
    work = dataclasses.replace(work, target=8)
    assert work.tokens == 32 + 8
    made = plan(work)
    # Four projections of the encoder, eight of the decoder; two matrices of either's other half.
    parameters = 4 * 2 * (12 * (64 + 2 * 32) + 2 * 2 * (64 + 128))
    assert made.device.adapters == 4 * parameters
    assert made.device.embeddings == 2 * 256 * 64
    # What is planned can be run: the loss of random weights on a random batch.
    graphdef, lora, frozen = split_adapters(model_shapes(work))
    model = nnx.merge(graphdef, random_weights(lora), random_weights(frozen))
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), random_batch(work))
    total, tokens = nnx.jit(loss_for(model))(model, batch, None)
    assert tokens == 8
    assert np.isfinite(total)


PUBLISHED = {
    "llama-65b": 65.3,
    "llama-3-8b": 8.03,
    "llama-3-405b": 405.9,
    "llama-3.2-1b": 1.24,
    "mistral-7b": 7.25,
    "mistral-nemo-12b": 12.2,
    "mistral-small-24b": 23.6,
    "mistral-large-123b": 122.6,
    "mixtral-8x7b": 46.7,
    "qwen2.5-72b": 72.7,
    "qwen3-0.6b": 0.6,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.0,
    "granite-3.3-8b": 8.17,
    "olmo-2-7b": 7.3,
    "olmo-2-13b": 13.7,
    "smollm3-3b": 3.08,
    "t5-3b": 2.85,
    "t5-11b": 11.3,
    "flan-t5-xxl": 11.1,
}
"""Billions of weights."""
ONE_OF_A_KIND = ("llama-65b", "mixtral-8x7b", "qwen3-0.6b", "t5-11b")


@pytest.mark.parametrize(
    "name",
    [n if n in ONE_OF_A_KIND else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED],
)
def test_named_shapes_have_the_weights_that_their_names_say(name):
    work = Workload(find_config(name), quant=None, lora=LoraConfig(r=1))
    _, _, frozen = split_adapters(model_shapes(work))
    weights = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    assert weights / 1e9 == pytest.approx(PUBLISHED[name], rel=0.02)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="llama-65b"):
        find_config("llama-66b")
    with pytest.raises(ValueError, match="'roberta', but plans are made of"):
        find_config(ROBERTA)
    with pytest.raises(ValueError, match="reads one sequence"):
        dataclasses.replace(WORK, target=8)
    with pytest.raises(ValueError, match="stream_weights is set, but an encoder–decoder"):
        Workload(find_config(TINY_T5), stream_weights=True)


def test_streaming_tells_when_copies_hide():
    wide = TINY | {"hidden_size": 512, "intermediate_size": 512}
    made = dataclasses.replace(
        WORK, config=find_config(wide), stream_weights=True, remat="full", attention="xla"
    )
    cost = stream_cost(model_shapes(made), sequence=made.sequence)
    step = training_step(made)
    # The number that is printed is the one that the traced step moves.
    assert cost.transfer == host_traffic(step.program.fn, *step.placed).streamed_weights.to_device
    found = Streaming(cost, CARDS["rtx-4090"], tokens=32)
    told = found.as_dict()
    assert told["flops"] / told["compute_seconds"] == pytest.approx(told["flops_per_second"])
    pcie = told["pcie"]
    assert [pcie[g]["bytes_per_second"] for g in ("3", "4", "5")] == [12e9, 25e9, 50e9]
    for generation in pcie.values():
        hidden = generation["tokens_to_hide"] / 32 * told["compute_seconds"]
        assert hidden >= generation["transfer_seconds"]
    assert f"{pcie['4']['tokens_to_hide']:,}" in "\n".join(found.lines())


def test_more_than_jaxs_pinned_pool_is_told_and_refused(monkeypatch):
    monkeypatch.delenv(HOST_LIMIT, raising=False)
    assert host_limit_for(64 * 2**30) is None
    assert host_limit_for(195 * 2**30) == 203
    monkeypatch.setenv(HOST_LIMIT, "203")
    assert host_limit_for(195 * 2**30) is None


@needs_compiler
@pytest.mark.parametrize(
    ("card", "note"),
    [
        ("t4", "the kernels need sm_80"),
        *(pytest.param(card, None, marks=pytest.mark.slow) for card in ("a100-40", "h100", "b200")),
        *(
            pytest.param(card, "does not know 'NVIDIA", marks=pytest.mark.slow)
            for card in ("rtx-3060", "rtx-5090")
        ),
    ],
)
def test_the_step_is_compiled_for_every_generation_of_cards(card, note):
    """Ada is in tests/memory, the A6000 in `test_the_command`."""
    made = plan(WORK, card)
    assert made.fits
    assert made.work.matmul == ("xla" if note else None)
    assert note is None or any(note in told for told in made.notes)


def test_a_models_name_is_the_papers_way_of_finetuning_it(monkeypatch):
    seen = []

    def keep(work, card):
        seen.append(work)
        raise LookupError

    monkeypatch.setattr("qlora_jax.plan.memory._for_target", keep)
    with pytest.raises(LookupError):
        ql.plan.plan("llama-65b", "l40")
    assert seen == [Workload(find_config("llama-65b"))]


@needs_compiler
def test_the_command(tmp_path, capsys):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    out, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["plan", str(folder), "--card", "a6000", "--no-search", "--sequence", "32"]
    arguments += ["--embedding-bits", "8", "--rank", "4", "--decode-length", "16"]
    arguments += ["--json", str(out), "--plot", str(figure)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "matmul: xla, since Pallas does not know" in printed
    assert "--matmul triton plans the kernels of its sibling" in printed
    (found,) = json.loads(out.read_text())
    parts = found["device"]
    assert sum(parts[name] for name in parts if name != "total") == parts["total"]
    assert found["fits"]
    assert found["load"] > parts["base"]
    # INT8 with a float32 for each 64 of them.
    assert "vocabulary in 8 bits" in printed
    assert (found["embedding_bits"], parts["embeddings"]) == (8, 2 * 256 * 128 * 8.5 / 8)
    assert figure.stat().st_size > 1000
    assert f"embedding and head  {parts['embeddings'] / 2**20:>8.2f} MiB" in printed


def test_a_search_that_reaches_its_end_says_so(monkeypatch):
    module = sys.modules[report.__module__]
    monkeypatch.setattr(module, "LARGEST_BATCH", 2)
    monkeypatch.setattr(module, "LONGEST_SEQUENCE", 256)
    made = plan(WORK, memory=2**40)
    monkeypatch.setattr(module, "plan", lambda *_, **__: made)
    small = types.SimpleNamespace(device=1, temporaries=1)
    monkeypatch.setattr(module, "program_bytes", lambda *_: small)
    found = report("tiny", WORK, memory=2**40)
    assert (found.largest_batch, found.largest_sequence) == (2, 256)
    printed = text([found])
    assert "largest batch at 32 tokens: 2 or more\n" in printed
    assert "longest sequence at batch 1: 256 tokens or more\n" in printed
    less = dataclasses.replace(found, largest_batch=1, largest_sequence=128)
    assert "more" not in text([less])


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_kernels_that_cannot_run_here_are_planned(tmp_path, devices):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    out = tmp_path / "plan.json"
    arguments = ["plan", str(tmp_path), "--card", "a6000", "--no-search", "--sequence", "32"]
    arguments += ["--matmul", "triton", "--devices", str(devices), "--decode-length", "16"]
    assert main([*arguments, "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    assert found["matmul"] == "triton"


@needs_compiler
@pytest.mark.slow
def test_the_command_says_nothing_of_devices_that_are_not_here(tmp_path):
    """Without JAX_PLATFORMS, JAX would look for GPUs with the plugin that is here to compile."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    program = "import sys; from qlora_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "plan", tmp_path, "--card", "l40"]
    command += ["--no-search", "--sequence", "32", "--decode-length", "16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "device" in done.stdout
    assert done.stderr == ""


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decode-length", "0"], "--decode-length is 0, but 1 or more"),
        (["--devices", "0"], "--devices is 0, but 1 or more"),
        (["--json", "."], "--json is ., which is a folder"),
        (["--plot", "plan.txt"], "one of .png, .svg, .pdf, and plan.txt is named as none"),
        (["--matmul", "mosaic_gpu"], "needs compute capability 9.0"),
        pytest.param(
            ["--attention", "cudnn"],
            "pip install --no-deps nvidia-cudnn-cu13",
            marks=pytest.mark.skipif(cudnn_available(), reason="cuDNN is here"),
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_before_it_is_compiled(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr("qlora_jax.plan.compiled.compile_lowered", None)
    assert main(["plan", str(tmp_path), "--card", "l40", "--no-search", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_command_needs_a_card(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    assert main(["plan", "llama-7b"]) == 2
    assert "--card" in capsys.readouterr().err


def test_every_option_of_the_command_is_planned(monkeypatch):
    seen = []

    def keep(name, work, card, **options):
        seen.append((work, card.name, options))
        raise ValueError("seen")

    monkeypatch.setattr("qlora_jax.cli.plan.report", keep)
    monkeypatch.setattr("qlora_jax.cli.plan.gpu_compiler_available", lambda: True)
    many = (
        "--batch 4 --devices 2 --cut-weights --accumulation 3 --sequence 64 --packed --rank 8 "
        "--lora-dtype bfloat16 --optim lion --lora-dropout 0.1 --quant fp4 --no-double-quant "
        "--embedding-bits 8 --no-paged --no-clip --remat offload --mlp-tile 128 --stream-weights "
        "--gradients-on-host --attention chunked --matmul xla --decode-batch 3 --decode-length 32 "
        "--no-search"
    )
    for model, options in (
        ("llama-7b", many),
        ("llama-7b", "--devices 2 --update-in-backward --quant none"),
        ("t5-small", "--target 9"),
    ):
        assert main(["plan", model, "--card", "l40", *options.split()]) == 2
    llama = Workload(find_config("llama-7b"))
    train = TrainConfig(
        micro_batch_size=4,
        gradient_accumulation_steps=3,
        max_grad_norm=None,
        paged=False,
        gradients_on_host=True,
        optim="lion",
        master_weights=True,
    )
    every = dataclasses.replace(
        llama,
        sequence=64,
        packed=True,
        train=train,
        lora=LoraConfig(r=8, lora_dropout=0.1, dtype=jnp.dtype("bfloat16")),
        quant=QuantConfig("fp4", double_quant=False),
        embedding_bits=8,
        remat="offload",
        stream_weights=True,
        mlp_tile=128,
        attention="chunked",
        matmul="xla",
        devices=2,
        cut_weights=True,
    )
    at_once = TrainConfig(micro_batch_size=2, update_in_backward=True, max_grad_norm=None)
    usual = {"search": True, "decode_batch": 1, "decode_length": 2048}
    assert seen == [
        (every, "l40", {"search": False, "decode_batch": 3, "decode_length": 32}),
        (dataclasses.replace(llama, train=at_once, quant=None, devices=2), "l40", usual),
        (Workload(find_config("t5-small"), target=9), "l40", usual),
    ]


def test_what_a_configuration_trains_is_planned():
    """As `load_model` builds it: modules to save, and layers by number."""
    lora = LoraConfig(r=4, modules_to_save=("lm_head",), layers_to_transform=(0,))
    model = model_shapes(dataclasses.replace(WORK, lora=lora))
    assert isinstance(model.lm_head.weight, TrainedParam)
    adapters = [leaf.size for leaf in jax.tree.leaves(nnx.state(model.layers, nnx.LoRAParam))]
    assert sum(adapters) == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(model_shapes(WORK).layers, nnx.LoRAParam))
    )


def test_a_token_is_multiplied_by_its_own_experts_alone():
    def flops(experts: int) -> float:
        config = dataclasses.replace(WORK.config, num_local_experts=4, num_experts_per_tok=experts)
        model = model_shapes(dataclasses.replace(WORK, config=config))
        return stream_cost(model, sequence=32).flops_per_token

    config = WORK.config
    frozen = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    adapters = 3 * 4 * (config.hidden_size + config.intermediate_size) * config.num_hidden_layers
    assert flops(3) - flops(2) == 2 * (3 * frozen + 4 * adapters)


def test_advice_ends_where_it_fits_and_leaves_out_what_saves_next_to_nothing(monkeypatch):
    def made(work, total):
        device = Components(0, 0, 0, 0, 0, 0, temporaries=total)
        return Plan(work, None, 1000, device, 0, HostTraffic(), ())

    totals = iter([1998, 1400, 900, 1])

    def plan(work, card, *, memory):
        assert (card, memory) == ("l40", 1000)
        return made(work, next(totals))

    monkeypatch.setattr(advice, "plan", plan)
    work = dataclasses.replace(WORK, remat="attention", attention="xla")
    found = advise(made(work, 2000), "l40")
    # The first switch saves a thousandth, and after the third it fits.
    assert [item.saves for item in found] == [600, 500]
    assert found[-1].plan.fits
    assert found[0].plan.work.attention == "xla"


def test_a_switch_makes_no_workload_that_cannot_be():
    backward = {"update_in_backward": True, "max_grad_norm": None}
    for changes in ({}, backward, {"gradient_accumulation_steps": 2}, {"optim": "lion_8bit"}):
        work = dataclasses.replace(WORK, train=TrainConfig(micro_batch_size=4, **changes))
        made = [switch.apply(work) for switch in SWITCHES]
        assert sum(found is not None for found in made) > 3


@pytest.mark.slow
def test_every_switch_can_be_tried_from_any_start():
    start = plan(dataclasses.replace(WORK, remat="attention", attention="xla"), memory=1)
    names = [item.switch.name for item in advise(start, None)]
    assert names
