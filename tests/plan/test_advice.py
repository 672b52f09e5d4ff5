"""What a plan advises and tells, and its small parts, without compiling anything."""

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cards import CARDS
from qlora_jax.data import IGNORE
from qlora_jax.models import DecoderConfig
from qlora_jax.models.streaming import HOST_LIMIT
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Workload, check_fits, compiled, find_config, memory, preflight
from qlora_jax.plan.advice import SWITCHES, Advice
from qlora_jax.plan.devices import with_cut_weights
from qlora_jax.plan.measure import random_batch
from qlora_jax.plan.memory import Components, Plan
from qlora_jax.plan.report import LONGEST_SEQUENCE, Report, _positions, text
from qlora_jax.plan.workload import (
    Program,
    batch_shapes,
    decoding_step,
    largest_dense,
    model_shapes,
)
from qlora_jax.quant import QuantConfig
from qlora_jax.train import Crossing, HostTraffic, TrainConfig
from tests.plan.test_plan import TINY, TINY_T5

report_module = sys.modules[Report.__module__]  # whose name in the package is a function's
GIB = 2**30
CONFIG, T5 = find_config(TINY), find_config(TINY_T5)
OPT = find_config(
    {
        "model_type": "opt",
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
)
SINGLE, NARROW = QuantConfig(double_quant=False), LoraConfig(dtype=jnp.bfloat16)
HEAD = LoraConfig(modules_to_save=("lm_head",))
BACKWARD = {"update_in_backward": True, "max_grad_norm": None}


def work_with(**changes) -> Workload:
    """Four rows of 32 tokens; `changes` are fields of the workload or of its training."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    train = {"micro_batch_size": 4} | {n: v for n, v in changes.items() if n in names}
    rest = {name: value for name, value in changes.items() if name not in names}
    return Workload(**{"config": CONFIG, "sequence": 32} | rest, train=TrainConfig(**train))


@pytest.mark.parametrize(
    ("name", "given", "made"),
    [
        ("attention", {"attention": "xla"}, {"attention": None}),
        ("attention", {"attention": "chunked"}, None),
        ("double_quant", {"quant": SINGLE}, {"quant": QuantConfig()}),
        ("double_quant", {}, None),
        ("double_quant", {"quant": None}, None),
        ("paged", {"paged": False}, {"paged": True}),
        ("paged", {}, None),
        ("remat: full", {"remat": "attention"}, {"remat": "full"}),
        ("remat: full", {}, None),
        (
            "micro_batch_size",
            {"gradient_accumulation_steps": 3},
            {"micro_batch_size": 1, "gradient_accumulation_steps": 12},
        ),
        (
            "micro_batch_size",
            {"devices": 2},
            {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
        ),
        ("micro_batch_size", {"devices": 4}, None),
        ("micro_batch_size", BACKWARD, None),
        (
            "gradients_on_host",
            {"gradient_accumulation_steps": 2},
            {"gradients_on_host": True},
        ),
        ("gradients_on_host", {}, None),
        (
            "gradients_on_host",
            {"gradient_accumulation_steps": 2, "gradients_on_host": True},
            None,
        ),
        ("mlp_tile", {"sequence": 1025}, {"mlp_tile": 4096}),
        ("mlp_tile", {"sequence": 1024}, None),
        ("mlp_tile", {"sequence": 2048, "devices": 2}, None),
        ("mlp_tile", {"sequence": 2048, "mlp_tile": 512}, None),
        ("mlp_tile", {"sequence": 2048, "config": T5}, None),
        (
            "mlp_tile",
            {"sequence": 2048, "config": dataclasses.replace(CONFIG, num_local_experts=4)},
            None,
        ),
        ("devices.weights", {"devices": 2}, {"cut_weights": True}),
        ("devices.weights", {}, None),
        ("devices.weights", {"devices": 2, "cut_weights": True}, None),
        ("embedding_bits: 8", {}, {"embedding_bits": 8}),
        ("embedding_bits: 8", {"config": T5}, {"embedding_bits": 8}),
        ("embedding_bits: 8", {"embedding_bits": 8}, None),
        ("embedding_bits: 4", {"lora": HEAD}, None),
        (
            "embedding_bits: 4",
            {"config": dataclasses.replace(CONFIG, word_embed_proj_dim=48)},
            None,
        ),
        ("LoRA dtype", {}, {"lora": NARROW, "master_weights": True}),
        ("LoRA dtype", {"lora": NARROW}, None),
        ("update_in_backward", {}, BACKWARD),
        ("update_in_backward", BACKWARD, None),
        ("remat: offload", {"remat": "attention"}, {"remat": "offload"}),
        ("remat: offload", {"remat": "offload"}, None),
        ("stream_weights", {"remat": "attention"}, {"stream_weights": True, "remat": "full"}),
        ("stream_weights", {"remat": "offload"}, {"stream_weights": True}),
        ("stream_weights", {"stream_weights": True}, None),
        ("stream_weights", {"config": T5}, None),
    ],
)
def test_a_switch_changes_what_it_names_and_nothing_else(name, given, made):
    (switch,) = (switch for switch in SWITCHES if switch.name.startswith(name))
    wanted = None if made is None else work_with(**given | made)
    assert switch.apply(work_with(**given)) == wanted


@pytest.mark.parametrize(
    ("card", "changes", "attention", "matmul", "notes"),
    [
        ("l40", {}, "chunked", None, ["training takes cuDNN's, which needs about as much"]),
        ("l40", {"attention": "xla"}, "xla", None, []),
        *(
            ("l40", taken, "xla", None, ["attention: xla, since cuDNN's does not take this model."])
            for taken in (
                {"config": dataclasses.replace(CONFIG, attn_logit_softcapping=50.0)},
                {"config": dataclasses.replace(CONFIG, rope=None, alibi=True)},
                {"config": T5},
                {"packed": True},
            )
        ),
        (
            "t4",
            {},
            "chunked",
            "xla",
            [
                "attention: chunked, since cuDNN's needs sm_80 and this card is sm_75.",
                "matmul: xla, since the kernels need sm_80 and this card is sm_75.",
                "Tesla T4 computes bfloat16 in software: slow.",
            ],
        ),
        (
            "t4",
            {"compute_dtype": "float16", "quant": None},
            "chunked",
            None,
            ["attention: chunked, since cuDNN's needs sm_80"],
        ),
        ("a6000", {"attention": "xla"}, "xla", "xla", ["matmul: xla, since Pallas does not know"]),
        ("a6000", {"attention": "xla", "matmul": "triton"}, "xla", "triton", []),
    ],
)
def test_what_is_planned_otherwise_is_told(monkeypatch, card, changes, attention, matmul, notes):
    monkeypatch.setattr(memory, "cudnn_available", lambda: False)
    work, told = memory._for_target(work_with(**changes), CARDS[card])
    assert (work.attention, work.matmul) == (attention, matmul)
    assert len(told) == len(notes)
    assert all(part in note for part, note in zip(notes, told, strict=True))


def test_cudnns_attention_is_planned_where_it_is_here(monkeypatch):
    monkeypatch.setattr(memory, "cudnn_available", lambda: True)
    work, told = memory._for_target(work_with(), CARDS["l40"])
    assert (work.attention, told) == ("cudnn", ())


def test_more_than_jaxs_pinned_pool_is_a_note(monkeypatch):
    monkeypatch.delenv(HOST_LIMIT, raising=False)
    assert memory._about_the_host(64 * GIB) == []
    (note,) = memory._about_the_host(195 * GIB)
    assert "195 GiB is more than JAX's pool holds" in note
    assert f"{HOST_LIMIT}=203" in note


def made(total: int, memory: int | None = 100 * GIB, **changes) -> Plan:
    """A plan of so many bytes."""
    device = Components(0, 0, 0, 0, 0, 0, temporaries=total)
    return Plan(work_with(**changes), "l40", memory, device, 0, HostTraffic(), ())


def test_the_pinned_pool_is_of_all_cards_that_are_here(monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "check_host_memory_limit", lambda *given: asked.append(given[0]))
    monkeypatch.setattr(
        preflight, "plan", lambda *_, **__: dataclasses.replace(made(GIB), host=10 * GIB)
    )
    here = jax.local_device_count()
    for devices in (1, 2, 2 * here):
        check_fits(work_with(micro_batch_size=devices, devices=devices), memory=GIB)
    assert asked == [10 * GIB, 20 * GIB, here * 10 * GIB]


def test_a_twentieth_of_a_card_is_not_a_programs():
    fits, missing = made(950, memory=1000), made(951, memory=1000)
    assert (fits.usable, fits.fits, fits.spare) == (950, True, 0)
    assert (missing.fits, missing.spare) == (False, -1)
    unknown = made(950, memory=None)
    assert (unknown.usable, unknown.fits, unknown.spare) == (None, None, None)


def test_how_advice_reads():
    """By how much it does not fit, what each switch saves, and what is left if none is enough."""
    first, last = made(97 * GIB), made(95 * GIB)
    found = Report(
        name="tiny",
        plan=made(99 * GIB),
        decode=GIB,
        decode_batch=1,
        decode_length=16,
        load=3 * GIB // 2,
        largest_batch=None,
        largest_sequence=None,
        advice=(Advice(SWITCHES[0], first, 2 * GIB), Advice(SWITCHES[2], last, 2 * GIB)),
    )
    printed = text([found])
    assert "does not fit: 4.00 GiB too much; 95.00 of the card's 100.00 GiB are usable" in printed
    assert f"1. {SWITCHES[0].name}: -2.00 → 97.00 GiB. Cost: none." in printed
    assert f"2. {SWITCHES[2].name}: -2.00 → 95.00 GiB. Cost: {SWITCHES[2].cost}." in printed
    assert "decoding 1 × 16 tokens: 1.00 GiB; loading: at most 1.50 GiB" in printed
    assert "larger card" not in printed
    short = dataclasses.replace(found, advice=found.advice[:1])
    assert "Even so it does not fit: take a larger card" in text([short])
    assert "No switch helps: take a larger card" in text([dataclasses.replace(found, advice=())])
    assert "larger card" not in text([dataclasses.replace(found, advice=None)])


def test_a_search_ends_at_the_models_own_positions():
    assert isinstance(OPT, DecoderConfig)
    assert _positions(work_with(config=OPT)) == 128
    assert _positions(work_with()) == _positions(work_with(config=T5)) == LONGEST_SEQUENCE


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"gradient_accumulation_steps": 3}, 3 * 4 * 32),
        ({"config": T5}, 4 * (32 + 32)),
        ({"config": T5, "target": 8}, 4 * (32 + 8)),
        ({"devices": 2}, 4 * 32),
    ],
)
def test_tokens_of_an_update(changes, tokens):
    work = work_with(**changes)
    assert work.tokens == tokens
    alone = work.of_one_device
    assert (alone.devices, alone.cut_weights) == (1, False)
    assert alone.tokens == tokens // work.devices


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": 0}, "sequence is 0, but 1 token or more"),
        ({"config": T5, "target": 0}, "target is 0, but 1 token or more"),
        ({"config": T5, "mlp_tile": 64}, "mlp_tile is set, but an encoder–decoder"),
        ({"config": T5, "packed": True}, "packed is set, but an encoder–decoder"),
        ({"devices": 0}, "devices is 0 and micro_batch_size is 4"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        work_with(**changes)


def test_a_program_needs_its_arguments_and_what_it_makes():
    found = compiled.ProgramBytes(1, 2, 4, 8, 16, 32, 64, 128)
    assert (found.device, found.host) == (1 + 2 - 4 + 8, 16 + 32 - 64 + 128)


def test_an_answer_is_of_its_program_its_card_its_options_and_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path))
    asked = []
    buffers = ("argument", "output", "alias", "temp")
    memory = {f"{where}{b}_size_in_bytes": 1 for where in ("", "host_") for b in buffers}

    def compiles(lowered, options):
        asked.append((lowered, options))
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**memory))

    monkeypatch.setattr(
        compiled, "lower_for", lambda card, fn, **_: SimpleNamespace(as_text=lambda: fn)
    )
    monkeypatch.setattr(compiled, "compile_lowered", compiles)

    def count(text="a", card="l40", **more):
        """How often was asked so far."""
        compiled.program_bytes(Program(text, (), **more), CARDS[card])
        return len(asked)

    assert [count(), count(), count("b"), count(card="h100")] == [1, 1, 2, 3]
    assert count(options=(("x", True),)) == 4
    # Of several cards an address stands in the text, and what it leads to does not.
    here, there = ({"text": f'backend_config = "{n}"', "devices": 2} for n in (1, 2))
    assert [count(**here), count(**there)] == [5, 5]
    monkeypatch.setattr(compiled, "_kernel_sources", lambda: "others")
    assert [count(**there), count()] == [6, 6]
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    assert count() == 7
    # What another version kept under the name is asked anew.
    for file in compiled.cache_folder().iterdir():
        file.write_text("{}")
    assert [count(), count()] == [8, 8]


def test_what_is_searched_fits_and_is_asked_as_it_would_run(monkeypatch):
    asked = []

    def planned(work, card, *, memory):
        asked.append((work.train.micro_batch_size, work.sequence))
        assert memory == 10_000
        return made(work.train.micro_batch_size * work.sequence, memory)

    monkeypatch.setattr(report_module, "plan", planned)
    start = planned(work_with(devices=2, sequence=256), None, memory=10_000)
    start = dataclasses.replace(start, work=work_with(devices=2, sequence=256))
    asked.clear()
    # Of 9500 bytes that are usable: rows of 256 in pairs, and two rows in steps of 256.
    assert report_module._largest(start, None) == (36, 4608)
    assert all(rows % 2 == 0 if tokens == 256 else rows == 2 for rows, tokens in asked)


def test_gradients_are_of_one_layer_where_each_is_updated_at_once():
    lora = {
        "layers": {"A": jax.ShapeDtypeStruct((3, 5), jnp.float32)},
        "head": {"A": jax.ShapeDtypeStruct((7,), jnp.float32)},
    }
    assert memory._gradients(work_with(), lora) == 4 * (3 * 5 + 7)
    assert memory._gradients(work_with(**BACKWARD), lora) == 4 * (5 + 7)


def test_a_run_that_adds_noise_and_starts_from_the_weights_is_planned():
    started = LoraConfig(r=2, target_modules=("q_proj",), init_lora_weights="loftq")
    work = work_with(neftune_noise_alpha=5.0, lora=started, param_dtype="float32")
    model = model_shapes(work)
    assert model.neftune_noise_alpha == 5.0
    assert model.embed_tokens.weight.get_value().dtype == jnp.float32


def test_a_vocabulary_is_the_largest_tensor_that_is_loaded_as_it_is():
    """What is in stacks comes layer by layer."""
    assert largest_dense(work_with(quant=None)) == 2 * 256 * 128


def test_a_decoding_t5_keeps_keys_of_its_source_and_of_its_own_words():
    program = decoding_step(work_with(config=T5), batch=3, length=8)
    cache = program.args[3]
    assert (cache.key.shape, cache.source_key.shape) == ((2, 3, 2, 8, 32), (2, 3, 2, 32, 32))


def test_where_answers_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv(compiled.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / "qlora-jax" / "plan"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / ".cache" / "qlora-jax" / "plan"
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path / "own"))
    assert compiled.cache_folder() == tmp_path / "own" / "plan"


def test_a_card_with_its_part_of_the_weights_moves_its_part_of_all_but_activations():
    whole = HostTraffic(activations=Crossing(8, 8), paged_state=Crossing(9, 12))
    parts = HostTraffic(activations=Crossing(8, 8), paged_state=Crossing(3, 3))
    assert with_cut_weights(whole, 4) == parts


@pytest.mark.parametrize("changes", [{}, {"packed": True}, {"config": T5, "target": 8}])
def test_every_token_of_a_random_batch_is_trained_on(changes):
    work = work_with(gradient_accumulation_steps=2, **changes)
    batch = random_batch(work)
    shapes = batch_shapes(work)
    assert [(a.shape, a.dtype) for a in batch] == [(s.shape, s.dtype) for s in shapes]
    assert batch[0].shape == (2, 4, 32)
    assert (batch.labels != IGNORE).sum() == 2 * 4 * (8 if "target" in changes else 31)
    if "packed" in changes:
        assert (batch.segments == 1).all()
        assert (batch.positions == np.arange(32)).all()
    else:
        assert batch.attention_mask.all()
    if "target" not in changes:
        np.testing.assert_array_equal(batch.labels[..., 1:], batch.input_ids[..., 1:])
