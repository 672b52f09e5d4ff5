"""Generation against a loop without batches, padding or jit; reproducible prompt by prompt."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.generate import PAPER_SAMPLING, GenerationConfig, check_prompts, generate
from qlora_jax.generate.decode import advance, start
from qlora_jax.generate.generate import _slots
from qlora_jax.models.rope import RopeConfig
from tests.generate.fake import Recurrent
from tests.random_decoder import ONE_LAYER, random_decoder

MODEL = Recurrent()
PROMPTS = [[3], [5, 6, 7, 8, 9], [1, 2], list(range(10, 26)), [40] * 17]
# Few sizes, so that the tests share compiled programs.
GREEDY = GenerationConfig(max_new_tokens=10)
SAMPLED = GenerationConfig(max_new_tokens=10, temperature=0.9)


def greedy(prompt, steps, eos=()):
    written = []
    while len(written) < steps:
        written.append(int(jnp.argmax(MODEL.logits_after([*prompt, *written]))))
        if written[-1] in eos:
            break
    return tuple(written)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_equals_a_plain_loop(batch_size):
    found = generate(MODEL, PROMPTS, GREEDY, batch_size=batch_size)
    assert [g.tokens for g in found] == [greedy(prompt, 10) for prompt in PROMPTS]
    assert {g.finish for g in found} == {"length"}
    # In one batch all have room for the longest.
    unlike = [PROMPTS[0], PROMPTS[4]]
    found = generate(MODEL, unlike, GREEDY, batch_size=batch_size)
    assert [g.tokens for g in found] == [greedy(prompt, 10) for prompt in unlike]


class _Translator(Recurrent):
    """One that reads its prompt with an encoder, so that the answer begins anew."""

    encoder = None


@pytest.mark.parametrize("model", [MODEL, _Translator()], ids=["decoder", "encoder-decoder"])
def test_what_a_text_has_already_becomes_less_likely(model):
    config = dataclasses.replace(GREEDY, repetition_penalty=1.5)

    def expected(prompt):
        written = []
        while len(written) < 10:
            scores = np.array(MODEL.logits_after([*prompt, *written]))
            seen = sorted({*written, *(() if model is not MODEL else prompt)})
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * 1.5, scores[seen] / 1.5)
            written.append(int(scores.argmax()))
        return tuple(written)

    found = [one.tokens for one in generate(model, PROMPTS, config, batch_size=4)]
    assert found == [expected(prompt) for prompt in PROMPTS]
    assert found != [greedy(prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize(("prompt", "new"), [(18, 14), (18, 15), (3, 30)])
def test_padding_makes_no_text_a_long_one(prompt, new):
    """A Phi-3 turns texts beyond its first length by other factors; 32 tokens are not beyond 32."""
    factors = (1.0, 1.1, 1.2, 1.3), (4.0, 5.0, 6.0, 8.0)
    rope = RopeConfig(
        rope_type="longrope",
        original_max_position_embeddings=32,
        short_factor=factors[0],
        long_factor=factors[1],
    )
    model = random_decoder(dataclasses.replace(ONE_LAYER, rope=rope, head_dim=8))
    text = np.random.default_rng(0).integers(0, ONE_LAYER.vocab_size, prompt).tolist()
    (found,) = generate(model, [text], GenerationConfig(max_new_tokens=new), batch_size=1)
    scores = jax.jit(lambda model, ids: model(ids))(
        model, jnp.asarray([[*text, *found.tokens[:-1]]])
    )
    expected = np.argmax(scores[0, prompt - 1 :], axis=-1)
    assert list(found.tokens) == expected.tolist()


def test_a_row_ends_with_its_end_token_and_the_others_go_on(monkeypatch):
    prompts = PROMPTS[:4]
    plain = [greedy(prompt, 10) for prompt in prompts]
    eos = (plain[0][3], plain[1][6])
    config = GenerationConfig(max_new_tokens=10, eos_token_ids=eos)
    found = generate(MODEL, prompts, config, batch_size=4)
    assert [g.tokens for g in found] == [greedy(prompt, 10, eos) for prompt in prompts]
    assert "stop" in {g.finish for g in found}
    for generation in found:
        assert generation.finish == ("stop" if generation.tokens[-1] in eos else "length")
    # So, too, where somebody watches, to whom a row is shown until it ends.
    seen = []
    watched = generate(
        MODEL,
        prompts,
        config,
        batch_size=4,
        on_tokens=lambda i, tokens: seen.append((i, len(tokens))),
        every=2,
    )
    assert watched == found
    assert [count for i, count in seen if i == 0] == [1, 3, 4]
    # Where there are no others, nothing goes on.
    steps = []

    def counted(*arguments, **options):
        written = advance(*arguments, **options)
        steps.append(int(written.step))
        return written

    monkeypatch.setattr(importlib.import_module("qlora_jax.generate.generate"), "advance", counted)
    generate(MODEL, prompts[:1], config, batch_size=4)
    assert steps == [4]


def test_no_end_token_comes_too_early():
    first, second = (greedy(prompt, 10) for prompt in PROMPTS[:2])
    # One is to end with its fourth token, the other with its third, which is too early.
    eos = (first[3], second[2])
    config = GenerationConfig(max_new_tokens=10, min_new_tokens=3, eos_token_ids=eos)
    ended, went_on = generate(MODEL, PROMPTS[:4], config, batch_size=4)[:2]
    assert ended.tokens == first[:4]
    assert went_on.tokens[:2] == second[:2]
    assert len(went_on.tokens) > 3
    assert not {*went_on.tokens[:3]} & {*eos}


def test_rows_that_fill_a_batch_up_write_nothing(monkeypatch):
    """Or a batch would go on until they have ended, too."""
    lengths = []

    def watched(*arguments, **options):
        written = start(*arguments, **options)
        lengths.append(np.asarray(written.length).tolist())
        return written

    monkeypatch.setattr(importlib.import_module("qlora_jax.generate.generate"), "start", watched)
    generate(MODEL, PROMPTS[:2], GREEDY, batch_size=4)
    assert lengths == [[1, 1, 0, 0]]


def test_samples_do_not_depend_on_neighbours_order_or_batch_size():
    key = jax.random.key(7)
    prompts = PROMPTS[:4]
    together = generate(MODEL, prompts, SAMPLED, key=key, batch_size=4)
    assert generate(MODEL, prompts[::-1], SAMPLED, key=key, batch_size=4) == together[::-1]
    for prompt, expected in zip(prompts, together, strict=True):
        assert generate(MODEL, [prompt], SAMPLED, key=key, batch_size=1) == [expected]
    other = generate(MODEL, prompts, SAMPLED, key=jax.random.key(8), batch_size=4)
    assert other != together


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_prompts_may_be_arrays(array):
    rows, key = [[5, 6], [7, 8]], jax.random.key(0)
    expected = generate(MODEL, rows, SAMPLED, key=key, batch_size=4)
    assert generate(MODEL, array(rows), SAMPLED, key=key, batch_size=4) == expected
    several = [array(row) for row in rows]
    assert generate(MODEL, several, SAMPLED, key=key, batch_size=4) == expected


def test_a_prompt_that_comes_twice_gets_two_samples():
    first, second = generate(MODEL, [[5, 6]] * 2, SAMPLED, key=jax.random.key(0), batch_size=4)
    assert first != second


def test_every_token_is_drawn_anew():
    flat = Recurrent()
    flat.head[...] *= 0
    (found,) = generate(flat, [[5, 6]], SAMPLED, key=jax.random.key(0), batch_size=4)
    assert len({*found.tokens}) > 5


def test_watching_changes_nothing_and_sees_everything():
    seen = {i: [] for i in range(len(PROMPTS))}
    found = generate(
        MODEL,
        PROMPTS,
        GREEDY,
        batch_size=4,
        on_tokens=lambda i, tokens: seen[i].append(tokens),
        every=4,
    )
    assert found == generate(MODEL, PROMPTS, GREEDY, batch_size=4)
    for index, generation in enumerate(found):
        assert [len(tokens) for tokens in seen[index]] == [1, 5, 9, 10]
        assert all(generation.tokens[: len(t)] == t for t in seen[index])


def test_the_watcher_may_end_rows():
    found = generate(
        MODEL,
        PROMPTS,
        GREEDY,
        batch_size=4,
        on_tokens=lambda i, tokens: i == 1 and len(tokens) >= 5,
        every=4,
    )
    assert found[1].finish == "stop"
    assert found[1].tokens == greedy(PROMPTS[1], 5)
    assert found[0].tokens == greedy(PROMPTS[0], 10)
    # Where it ends all of them, that is the end.
    found = generate(MODEL, PROMPTS, GREEDY, batch_size=4, on_tokens=lambda *_: True)
    assert [g.tokens for g in found] == [greedy(prompt, 1) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("longest", "positions", "slots"),
    [(1, None, 16), (16, None, 16), (17, None, 32), (17, 30, 20), (20, 30, 20)],
)
def test_a_batch_is_padded_to_a_bucket_that_leaves_room(longest, positions, slots):
    shape = types.SimpleNamespace(max_position_embeddings=positions)
    assert _slots(longest, shape, GREEDY) == slots


def test_one_program_serves_all_prompts_of_a_bucket():
    generate(MODEL, [[1]], GREEDY, batch_size=4)
    before = start._cache_size(), advance._cache_size()
    rng = np.random.default_rng(0)
    for length in (1, 7, 16):
        prompts = [rng.integers(0, 50, length).tolist() for _ in range(3)]
        generate(MODEL, prompts, GREEDY, batch_size=4)
    assert (start._cache_size(), advance._cache_size()) == before


def test_no_prompts_no_generations():
    assert generate(MODEL, [], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "config", "options", "message"),
    [
        ([[]], GenerationConfig(), {}, "prompt 0 is empty"),
        ([1, 2], GenerationConfig(), {}, r"prompt 0 is 1, .* give one alone as \[ids\]"),
        (["The sea"], GenerationConfig(), {}, "prompt 0 is 'The sea', .* texts to generate_text"),
        ([[0.5]], GenerationConfig(), {}, "prompt 0 is .* a sequence of token ids"),
        ([[1]], SAMPLED, {}, "give key="),
        ([[1]], GenerationConfig(stop=("x",)), {}, "call generate_text"),
        ([[1]], GenerationConfig(), {"batch_size": 0}, "must be 1 or more"),
        ([[1]], GenerationConfig(), {"every": 0}, "must be 1 or more"),
    ],
)
def test_bad_input_is_refused(prompts, config, options, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, prompts, config, **options)


def test_prompt_and_answer_may_fill_the_positions_of_the_model():
    shape = types.SimpleNamespace(max_position_embeddings=16)
    for room, new in ((10, 6), (1, 15)):
        config = GenerationConfig(max_new_tokens=new)
        check_prompts([[1] * room], config, shape)
        with pytest.raises(ValueError, match=f"prompt 1 has {room + 1} tokens, .* 16 positions"):
            check_prompts([[1], [1] * (room + 1)], config, shape)
    with pytest.raises(ValueError, match="=16 leaves no room for a prompt in the model's 16 pos"):
        check_prompts([], GenerationConfig(max_new_tokens=16), shape)


@pytest.mark.parametrize("token", [-1, ONE_LAYER.vocab_size])
def test_a_token_that_the_model_has_no_row_for_is_refused(token):
    """It would be read as NaN, and the answer be token 0 over and over."""
    words = rf"prompt 1 has the token {token}, .* vocabulary has {ONE_LAYER.vocab_size}"
    with pytest.raises(ValueError, match=words):
        generate(random_decoder(ONE_LAYER), [[49], [3, token]], GREEDY)


def test_the_papers_sampling():
    sampling = PAPER_SAMPLING
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, None)
    assert sampling.max_new_tokens == 512


def test_one_end_or_a_list_of_them_is_a_tuple():
    assert GenerationConfig(stop="###").stop == ("###",)
    assert GenerationConfig(eos_token_ids=0).eos_token_ids == (0,)
    several = GenerationConfig(stop=["a", "b"], eos_token_ids=[1, 2])
    assert (several.stop, several.eos_token_ids) == (("a", "b"), (1, 2))
    assert hash(several) == hash(GenerationConfig(stop=("a", "b"), eos_token_ids=(1, 2)))


def test_a_model_without_the_protocol_is_refused():
    with pytest.raises(ValueError, match="cannot generate"):
        generate(object(), [[1]])
