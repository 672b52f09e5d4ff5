"""Plans for several cards of one machine: what each of them has."""

import dataclasses
import re

import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import compile_for
from qlora_jax.cli import main
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Workload, compiled, find_config, plan
from qlora_jax.plan.advice import advise
from qlora_jax.plan.devices import mesh_of
from qlora_jax.plan.workload import training_step, tree_bytes
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig
from tests.memory.goals import GIB, needs_compiler
from tests.plan.test_plan import TINY

CARDS_USED = 4
WORK = Workload(
    find_config(TINY),
    sequence=32,
    train=TrainConfig(micro_batch_size=CARDS_USED, page_min_size=0),
    lora=LoraConfig(r=4),
    devices=CARDS_USED,
)
CUT = dataclasses.replace(WORK, cut_weights=True)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled.CACHE_VARIABLE, str(tmp_path_factory.mktemp("plans")))
        yield


@pytest.mark.slow
@needs_compiler
def test_each_card_has_its_part():
    alone, whole, cut = (plan(work, "l40") for work in (WORK.of_one_device, WORK, CUT))
    for name in ("base", "embeddings", "adapters", "gradients"):
        assert getattr(whole.device, name) == getattr(alone.device, name)
    for name in ("embeddings", "adapters", "gradients"):
        assert getattr(cut.device, name) == getattr(alone.device, name) // CARDS_USED
    # Nested absmax, offsets and norms are whole.
    assert cut.device.base < 0.3 * alone.device.base
    for shared in (whole, cut):
        assert shared.device.activations == pytest.approx(alone.device.activations, rel=0.02)
    # Moments are paged: to the host of each card goes what belongs to its adapters.
    assert whole.host == alone.host
    assert cut.host == pytest.approx(alone.host / CARDS_USED, rel=0.01)
    assert whole.traffic == alone.traffic
    assert cut.traffic.to_host == pytest.approx(alone.traffic.to_host / CARDS_USED, rel=0.01)
    assert cut.device.total < whole.device.total


@pytest.mark.slow
@needs_compiler
def test_the_answer_is_kept(monkeypatch):
    """Although an op's partitioning stands in a program by its address."""
    first = plan(CUT, "l40")

    def again(*_args, **_options):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiled, "compile_lowered", again)
    assert plan(CUT, "l40") == first


@needs_compiler
@pytest.mark.parametrize(
    ("model", "quant"),
    [
        ("llama-2-7b", QuantConfig()),
        pytest.param("llama-2-7b", None, marks=pytest.mark.slow),
        pytest.param("mixtral-8x7b", QuantConfig(), marks=pytest.mark.slow),
    ],
    ids=["nf4", "bf16", "experts"],
)
def test_activations_stay_with_their_rows(model, quant):
    """Of the batch only looked-up rows of the vocabulary are exchanged, whose columns are cut.

    At a 7B layer's width: XLA exchanges no activations of a narrow one, whatever it is told.
    """
    card, tokens = CARDS["rtx-4090"], 384
    config = dataclasses.replace(find_config(model), num_hidden_layers=2)
    train = TrainConfig(micro_batch_size=2)
    work = Workload(
        config, tokens, train=train, quant=quant, attention="xla", devices=2, cut_weights=True
    )
    program = training_step(work, mesh=mesh_of(card, 2)).program
    hlo = compile_for(card, program.fn, *program.args, count=2).as_text()
    ops = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    sent = re.findall(rf"= (.*?) ({ops})(?:-start)?\(", hlo)
    # No dimension of the model, or of its part on a card, has this size.
    of_batch = [
        op
        for text, op in sent
        if any(
            str(tokens) in shape.split(",")
            for shape in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", text)
        )
    ]
    assert of_batch == ["all-to-all"]
    # Parts of experts lie one after another: [cards, experts, rows / cards, …]. Gathered along
    # their rows, the stack of all layers would be laid out anew first.
    assert not [text for text, op in sent if op == "all-gather" and "u8[8," in text]


@pytest.mark.slow
def test_on_the_devices_here():
    """Simulated ones; what rests is as large as on any other."""
    here = plan(CUT)
    step = training_step(CUT, present=True, mesh=mesh_of(None, CARDS_USED))
    resting = tree_bytes((step.lora, step.frozen))
    assert here.device.base + here.device.embeddings + here.device.adapters == resting
    with pytest.raises(ValueError, match="devices is 16, but this process has 8"):
        plan(dataclasses.replace(CUT.at(16), devices=16))


@needs_compiler
@pytest.mark.slow
def test_cutting_is_advised_where_whole_weights_do_not_fit():
    made = plan(WORK, "l40")
    tight = plan(WORK, "l40", memory=int((made.device.total - made.device.base // 2) / 0.95))
    assert tight.fits is False
    advised = advise(tight, "l40")
    assert "devices.weights: cut" in [item.switch.name for item in advised]
    assert advised[-1].plan.fits


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"devices is 999, but this process has \d+ "):
        mesh_of(None, 999)


def test_what_does_not_divide_is_refused(capsys):
    with pytest.raises(ValueError, match="devices is 4 and micro_batch_size is 6"):
        WORK.at(6)
    assert main(["plan", "llama-7b", "--card", "l40", "--devices", "2", "--batch", "3"]) == 2
    assert "multiple of the devices" in capsys.readouterr().err


@needs_compiler
@pytest.mark.slow
def test_70b_on_two_rtx_4090():
    """Answer.AI's FSDP-QLoRA takes 14.9 GiB a card with offloading (facts/peers.md)."""
    work = Workload(
        find_config("llama-2-70b"),
        sequence=2048,
        train=TrainConfig(micro_batch_size=2),
        devices=2,
        cut_weights=True,
        stream_weights=True,
    )
    streamed = plan(work, "rtx-4090")
    assert streamed.device.total < 9 * GIB
    assert streamed.fits
    # Each card's half of the codes rests on the host.
    resting = plan(dataclasses.replace(work, stream_weights=False), "rtx-4090")
    assert resting.device.total < 25 * GIB
    assert streamed.host > resting.host + 0.98 * resting.device.base
