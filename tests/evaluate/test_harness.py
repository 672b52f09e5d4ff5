"""The adapter to lm-evaluation-harness: scores against float64, answers, and a task of its own."""

import abc
import dataclasses
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.data import IGNORE, ChatTemplate, load_tokenizer
from qlora_jax.evaluate import Harness, harness, mmlu, split_adapters
from qlora_jax.generate import GenerationConfig, generate_text
from qlora_jax.models import RopeConfig
from tests.random_decoder import ONE_LAYER, random_decoder
from tests.shared import shared_path

WINDOW = 16


@pytest.fixture(scope="module")
def stories():
    return load_tokenizer(shared_path("data/models/stories260K"))


@pytest.fixture(scope="module")
def model():
    decoder = random_decoder(ONE_LAYER)
    decoder.lm_head.weight[...] *= 40
    return decoder


@pytest.fixture(scope="module")
def logits(model):
    """Token ids -> float64 logits at each, by one forward pass of fixed length."""
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, row: nnx.merge(graphdef, state)(row[None])[0])

    def of(ids):
        row = np.pad(np.asarray(ids, np.int32), (0, 64 - len(ids)))
        return np.asarray(forward(state, row), np.float64)[: len(ids)]

    return of


def nats(scores: np.ndarray, token: int) -> float:
    return float(scores[token] - np.log(np.exp(scores - scores.max()).sum()) - scores.max())


def test_log_probabilities_in_float64(model, stories, logits):
    subject = Harness(model, stories, max_len=WINDOW, batch_size=4)
    best = int(logits(stories.encode("Once upon"))[-1].argmax())
    greedy = stories.decode([stories.encode("Once upon")[-1], best])[len("upon") :]
    requests = [
        ("Once upon", " a time there was"),
        ("Once upon ", "a time there was"),  # the space belongs to what follows
        ("", "Once"),
        ("Once upon a time there was a little girl who liked to play", " outside with her"),
    ]
    found = subject.loglikelihood(requests)
    for (context, continuation), (score, _) in zip(requests, found, strict=True):
        whole = stories.encode(context + continuation)
        count = len(whole) - len(stories.encode(context.rstrip()))
        read = whole[-WINDOW - 1 :]
        assert count < len(read)
        steps = logits(read[:-1])
        at = range(len(read) - 1 - count, len(read) - 1)
        expected = sum(nats(steps[i], read[i + 1]) for i in at)
        assert score == pytest.approx(expected, abs=1e-4)
    assert found[0] == found[1]
    pair = subject._pair("Once upon", greedy)
    if pair.continuation == [best]:  # a token that a text can bring about
        ((_, is_greedy),) = subject.loglikelihood([("Once upon", greedy)])
        assert is_greedy
    assert subject._score([harness._Scored(stories.encode("Once upon"), [best])])[0][1]
    assert not subject._score([harness._Scored(stories.encode("Once upon"), [best ^ 1])])[0][1]


def test_scores_are_the_same_in_any_pieces(model):
    graphdef, lora, frozen = split_adapters(model)
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 512, (2, 3, 13)).astype(np.int32)
    targets[1, :9] = targets[2] = IGNORE
    whole, pieces = (
        harness.make_score_step(graphdef, chunk=chunk)(lora, frozen, ids, targets)
        for chunk in (39, 7)
    )
    np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-6)
    np.testing.assert_array_equal(whole[1], pieces[1])
    assert pieces[1].tolist() == [False, False, True]
    assert pieces[0][2] == 0


def test_how_far_rows_are_padded_does_not_matter():
    """Nor to rotary positions that stretch with the length that is read; of MMLU's, too."""
    rope = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=12)
    stretching = random_decoder(dataclasses.replace(ONE_LAYER, rope=rope))
    graphdef, lora, frozen = split_adapters(stretching)
    ids, targets = np.random.default_rng(0).integers(0, 512, (2, 2, 12)).astype(np.int32)
    targets[:, :5], last = IGNORE, np.array([11, 11], np.int32)
    score, ask = harness.make_score_step(graphdef), mmlu._answer_scores(())
    found = []
    for padding in (0, 20):
        wide = ((0, 0), (0, padding))
        row, wanted = np.pad(ids, wide), np.pad(targets, wide, constant_values=IGNORE)
        answers = ask(graphdef, lora, frozen, row, last, tokens=(1, 2))
        found.append((score(lora, frozen, row, wanted)[0], answers))
    for tight, padded in zip(*found, strict=True):
        np.testing.assert_allclose(padded, tight, rtol=1e-5)


@pytest.mark.parametrize("words", [3, 30])
def test_documents_are_scored_with_as_long_a_context_as_fits(model, stories, logits, words):
    text = " ".join(["Tom", "ran", "home"] * 10)[: words * 5].strip()
    ids = stories.encode(text, bos=False)
    read = [stories.bos_token_id, *ids]
    expected, predicted = 0.0, 0
    while predicted < len(ids):
        end = min(predicted + WINDOW, len(ids))
        window = read[max(end - WINDOW, 0) : end]
        steps = logits(window)
        for target in range(predicted, end):
            expected += nats(steps[target - (end - len(window))], ids[target])
        predicted = end
    subject = Harness(model, stories, max_len=WINDOW, batch_size=2)
    assert subject.loglikelihood_rolling([(text,), ("",), (text,)]) == pytest.approx(
        [expected, 0.0, expected], abs=1e-3
    )


def test_answers_are_those_of_generate(model, stories):
    subject = Harness(model, stories, max_len=48, batch_size=2)
    options = {"max_gen_toks": 6, "until": "\n"}
    prompts = ["Once", "Tom and Sam", "a " * 80]
    found = subject.generate_until([(prompt, options) for prompt in prompts])
    config = GenerationConfig(max_new_tokens=6, stop=("\n",))
    # Of 42 tokens, the first is the bos token.
    cut = stories.decode(stories.encode(prompts[2])[-41:])
    assert len(stories.encode(cut)) == 42
    expected = generate_text(model, stories, [*prompts[:2], cut], config, batch_size=2)
    assert found == [answer.text for answer in expected]
    sampled = harness._generation({"do_sample": True, "temperature": 0.7, "until": ["a", "b"]})
    assert (sampled.temperature, sampled.stop, sampled.max_new_tokens) == (0.7, ("a", "b"), 256)
    # As the harness has it: a temperature alone samples, but not where do_sample says no.
    assert harness._generation({"temperature": 0.7}).temperature == 0.7
    assert harness._generation({"temperature": 0.7, "do_sample": False}).temperature == 0.0
    with pytest.raises(ValueError, match="leaves no room for a context in max_len=48"):
        subject.generate_until([("Once", {"max_gen_toks": 48})])


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_the_limit_of_answers_has_several_names(name):
    assert harness._generation({name: 7}).max_new_tokens == 7
    assert harness._generation({name: 7, "max_gen_toks": 5}).max_new_tokens == 5


def test_options_of_generation_are_known_or_refused():
    plain = harness._generation({"until": ["", "a"], "num_beams": 1})
    assert (plain.stop, plain.greedy) == (("a",), True)
    drawn = harness._generation({"do_sample": True, "top_p": 0.9, "top_k": 5})
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (1.0, 0.9, 5)
    less = harness._generation({"min_p": 0.05, "repetition_penalty": 1.2})
    assert (less.min_p, less.repetition_penalty, less.greedy) == (0.05, 1.2, True)
    for strange in ({"num_beams": 4}, {"length_penalty": 1.2}, {"max_length": 90}):
        (name,) = strange
        with pytest.raises(ValueError, match=f"have {name}=.*, which is not supported here"):
            harness._generation(strange)


def test_a_template_that_writes_bos_gets_no_second_one(model, stories):
    template = ChatTemplate("{{ bos_token }}{{ messages[0]['content'] }}", {"bos_token": "<s>"})
    chat = Harness(model, stories, max_len=48, chat_template=template)
    plain = Harness(model, stories, max_len=48)
    text = chat.conversation([{"role": "user", "content": "Once upon"}])
    assert text == "<s>Once upon"
    assert chat.loglikelihood([(text, " a time")]) == plain.loglikelihood(
        [("Once upon", " a time")]
    )
    options = {"max_gen_toks": 6}
    # The second one is cut, and so begins with a bos of the tokenizer's.
    prompts = ["Once upon", "a " * 80]
    found = chat.generate_until([(f"<s>{prompt}", options) for prompt in prompts])
    expected = plain.generate_until([(prompt, options) for prompt in prompts])
    assert [answer.strip() for answer in found] == [answer.strip() for answer in expected]


def test_a_last_turn_that_the_model_goes_on_with_stays_open(model, stories):
    template = ChatTemplate(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>\n{% endfor %}"
    )
    subject = Harness(model, stories, max_len=WINDOW, chat_template=template)
    turns = [{"role": "user", "content": "So"}, {"role": "assistant", "content": " So far "}]
    text = subject.conversation(turns, add_generation_prompt=False)
    assert text == "<user>So</>\n<assistant>So far"
    untrimmed = ChatTemplate(template.source.replace(" | trim", ""))
    subject = Harness(model, stories, max_len=WINDOW, chat_template=untrimmed)
    text = subject.conversation(turns, add_generation_prompt=False)
    assert text == "<user>So</>\n<assistant> So far "
    loud = ChatTemplate(template.source.replace("| trim", "| upper"))
    with pytest.raises(ValueError, match="rewrites 'So far '"):
        Harness(model, stories, max_len=WINDOW, chat_template=loud).conversation(
            turns, add_generation_prompt=False
        )


@pytest.mark.parametrize("start", range(4))
def test_a_long_context_fits_the_models_own_positions(model, stories, start):
    """Cut anywhere, even inside of a word: what is left may take other tokens than before."""
    context = ("Zyxwv qponm " * 30)[start:]
    subject = Harness(model, stories, max_len=model.config.max_position_embeddings, batch_size=1)
    options = {"max_gen_toks": 6, "until": "\n"}
    assert len(subject.generate_until([(context, options)])) == 1
    kept = subject._shortened(context, 58)
    assert context.strip().endswith(kept.strip())
    assert 50 < len(stories.encode(kept)) <= 58


class Base(abc.ABC):
    """What the harness's class asks for."""

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...


def test_as_the_harnesss_own_class(model, stories):
    template = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}", {}, "t")
    subject = Harness(model, stories, max_len=WINDOW, chat_template=template)
    lm = harness._as_lm(subject, Base)
    assert isinstance(lm, Base)
    request = types.SimpleNamespace(args=("Once", " upon"))
    assert lm.loglikelihood([request]) == subject.loglikelihood([("Once", " upon")])
    rolling = types.SimpleNamespace(args=("Once upon",))
    assert lm.loglikelihood_rolling([rolling]) == subject.loglikelihood_rolling([("Once upon",)])
    assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"
    assert lm.chat_template() == template.source
    assert lm.tokenizer_name == "stories260K"
    plain = harness._as_lm(Harness(model, stories, max_len=WINDOW), Base)
    assert plain.chat_template() == ""
    with pytest.raises(ValueError, match="no chat template: give Harness one"):
        plain.apply_chat_template([])
    with pytest.raises(ValueError, match="adds no token to its context"):
        subject.loglikelihood([("Once", "")])
    with pytest.raises(ValueError, match="max_len=1 must be 2 or more"):
        Harness(model, stories, max_len=1)
    with pytest.raises(ValueError, match="batch_size=0 1"):
        Harness(model, stories, max_len=2, batch_size=0)
    # Of a family without bos, a text without a context follows eos.
    without = dataclasses.replace(stories, bos_token_id=None, pad_token_id=0)
    eos = [without.eos_token_id]
    assert Harness(model, without, max_len=2)._pair("", "Once").context == eos


def test_a_task_under_the_harness_itself(model, stories, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"question": "Tom ran", "choices": ["home", "zebra"], "answer": 0}\n'
        '{"question": "Once upon a", "choices": ["table", "time"], "answer": 1}\n'
    )
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n"
    )
    subject = Harness(model, stories, max_len=WINDOW)
    found = lm_eval.simple_evaluate(
        subject.lm(),
        tasks=["tiny_choice"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    pairs = [("Tom ran", (" home", " zebra"), 0), ("Once upon a", (" table", " time"), 1)]
    right = [
        np.argmax([score for score, _ in subject.loglikelihood([(q, c) for c in choices])])
        == answer
        for q, choices, answer in pairs
    ]
    assert found["results"]["tiny_choice"]["acc,none"] == np.mean(right)


def test_crows_pairs_under_the_harness_itself(model, stories, logits, tmp_path):
    """The harness's own task on rows of its form: whole sentences, behind no context at all."""
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = [
        ("gender", "Tom liked to run.", "Sue liked to run."),
        ("age", "The old man sat.", "The young man sat."),
        ("gender", "My mom was sad.", "My dad was sad."),
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"bias_type": bias, "sent_more": more, "sent_less": less}) + "\n"
            for bias, more, less in rows
        )
    )
    theirs = Path(tasks.__file__).parent / "crows_pairs"
    for part in ("english", "english_gender"):
        (tmp_path / f"{part}.yaml").write_text(
            f"include: {theirs}/crows_pairs_{part}.yaml\ntask: local_{part}\n"
            f"dataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        )
    found = lm_eval.simple_evaluate(
        Harness(model, stories, max_len=64, batch_size=4).lm(),
        tasks=["local_english", "local_english_gender"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )["results"]

    def log_probability(sentence: str) -> float:
        ids = stories.encode(sentence)
        assert ids[0] == stories.bos_token_id
        return sum(
            nats(scores, token) for scores, token in zip(logits(ids[:-1]), ids[1:], strict=True)
        )

    apart = [log_probability(more) - log_probability(less) for _, more, less in rows]
    for task, chosen in (("local_english", apart), ("local_english_gender", apart[::2])):
        assert found[task]["likelihood_diff,none"] == pytest.approx(
            np.mean(np.abs(chosen)), abs=1e-4
        )
        assert found[task]["pct_stereotype,none"] == np.mean(np.array(chosen) > 0)
