"""PEFT's rules of which module a name means (its `check_target_module_exists`), by example."""

import pytest

from qlora_jax.nn import LoraConfig

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("targets", "path", "means"),
    [
        (("q_proj",), Q, True),
        (("self_attn.q_proj",), Q, True),
        ((Q,), Q, True),
        (("proj",), Q, False),
        (("q_proj",), "q_proj", True),
        ((), Q, False),
        ("q_proj", Q, False),  # a text is a regular expression over the whole path
        (r".*\.q_proj", Q, True),
        (r"model\.layers\.[1-9]\..*", Q, False),
        (r".*\.q_pro", Q, False),
        ("all-linear", Q, True),
        ("all-linear", "lm_head", False),
        ("all-linear", "embed_out", False),
        ("all-linear", "classifier.dense", False),
        ("all-linear", "score", False),
        ("all-linear", "qa_outputs", False),
    ],
)
def test_target_modules(targets, path: str, means: bool) -> None:
    assert LoraConfig(target_modules=targets).targets(path) is means


def test_exclude_modules() -> None:
    by_name = LoraConfig(exclude_modules=("q_proj", "layers.1.mlp.up_proj"))
    assert not by_name.targets(Q)
    assert by_name.targets("model.layers.0.mlp.up_proj")
    assert not by_name.targets("model.layers.1.mlp.up_proj")
    assert not LoraConfig(exclude_modules=r".*self_attn.*").targets(Q)


def test_saved_modules_get_no_adapter() -> None:
    lora = LoraConfig(target_modules=("dense",), modules_to_save=("classifier",))
    assert lora.saves("classifier.dense")
    assert not lora.targets("classifier.dense")
    assert lora.targets("roberta.encoder.layer.0.output.dense")
    # PEFT compares the ends of paths, not of names, here.
    assert LoraConfig(modules_to_save=("norm",)).saves("model.layers.0.input_layernorm")
    assert not lora.saves("classifiers")
    # … but whole names here.
    assert LoraConfig(target_modules=("dense",), modules_to_save=("fier",)).targets(
        "classifier.dense"
    )


@pytest.mark.parametrize(
    ("layers", "pattern", "path", "means"),
    [
        ((0,), None, Q, True),
        ((1,), None, Q, False),
        (0, None, Q, True),
        ((), None, Q, True),  # none told: all
        ((0, 3), None, "base.layers.3.block_sparse_moe.experts.1.w1", True),  # the first number
        ((1,), None, "base.layers.3.block_sparse_moe.experts.1.w1", False),
        ((1,), ("experts",), "base.layers.3.block_sparse_moe.experts.1.w1", True),
        ((1,), "block", "encoder.block.1.layer.0.SelfAttention.q", True),
        ((0,), ("h",), Q, False),
        ((1,), ("h",), "h.1.q_proj", True),
        ((3,), ("layers",), "base.layers.3.layers.1.w1", True),  # the first such list
    ],
)
def test_layers_to_transform(layers, pattern, path: str, means: bool) -> None:
    lora = LoraConfig(
        target_modules=("q_proj", "w1", "q"), layers_to_transform=layers, layers_pattern=pattern
    )
    assert lora.targets(path) is means


def test_layers_to_transform_leaves_layers_that_are_named_whole() -> None:
    lora = LoraConfig(target_modules=(Q, "k_proj"), layers_to_transform=(1,))
    assert lora.targets(Q)
    assert not lora.targets(Q.replace("q_proj", "k_proj"))
    assert lora.targets("model.layers.1.self_attn.k_proj")


def test_patterns_set_rank_and_alpha_of_some_layers() -> None:
    lora = LoraConfig(
        r=8,
        alpha=16,
        rank_pattern={"q_proj": 4, r"model\.layers\.1\.mlp\.up_proj": 2},
        alpha_pattern={"up_proj": 32},
    )
    assert [lora.at(Q).r, lora.at(Q).scaling] == [4, 4.0]
    up = lora.at("model.layers.1.mlp.up_proj")
    assert (up.r, up.alpha, up.scaling) == (2, 32, 16.0)
    other = lora.at("model.layers.0.mlp.up_proj")
    assert (other.r, other.scaling) == (8, 4.0)
    assert lora.at("lm_head") is None
    assert LoraConfig(r=8, rank_pattern={"proj": 4}).at(Q).r == 8
    assert hash(lora) == hash(LoraConfig(**vars(lora)))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "from 1 to"),
        ({"r": 4.5}, "r is 4.5; the rank of an adapter is a whole number"),
        ({"rank_pattern": {"q_proj": "8"}}, "r is '8'"),
        ({"alpha": "16"}, "alpha is '16'; give a finite number"),
        ({"alpha": float("nan")}, "alpha is nan; give a finite number"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha is inf"),
        ({"alpha": 0, "init_lora_weights": "pissa"}, "alpha is 0, but init_lora_weights='pissa'"),
        (
            {"alpha_pattern": {"q_proj": -1}, "init_lora_weights": "loftq"},
            "alpha is -1, but init_lora_weights='loftq'",
        ),
        ({"dtype": "int32"}, "dtype is int32; give a float"),
        ({"dtype": "bf16"}, "dtype is bf16; give a float, such as float32 or bfloat16"),
        ({"dtype": None}, "dtype is None; give a float"),
        ({"dtype": "float8_e4m3fn"}, "dtype is float8_e4m3fn; give a float"),
        ({"target_modules": "(q_proj"}, r"target_modules has '\(q_proj', which is no regular"),
        ({"exclude_modules": "("}, "exclude_modules has"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has"),
        ({"alpha_pattern": {"(?i)q": 2}}, r"alpha_pattern has '\(\?i\)q'"),
        (
            {"layers_to_transform": (0,), "layers_pattern": ("h", "(")},
            r"layers_pattern has '\('",
        ),
        ({"bias": "some"}, "none, lora_only, all"),
        ({"init_lora_weights": "olora"}, "'gaussian', 'loftq', 'pissa'"),
        ({"loftq_iter": 0}, "at least one round"),
        ({"target_modules": ".*q", "layers_to_transform": (0,)}, "the layers' numbers in the"),
        ({"layers_pattern": ("h",)}, "say which layers"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoraConfig(**options)


def test_names_that_mean_nothing_are_told() -> None:
    lora = LoraConfig(
        target_modules=("q_proj", "vproj"),
        exclude_modules=("lm_hed",),
        rank_pattern={r"layers\.0\..*q_proj": 2, "k_prj": 4},
        alpha_pattern={"q_proj": 8, "o": 2},
    )
    assert lora.idle([Q, "model.layers.0.self_attn.q_proj"]) == [
        "target_modules: vproj",
        "exclude_modules: lm_hed",
        "rank_pattern: k_prj",
        "alpha_pattern: o",
    ]
    assert LoraConfig().idle([Q]) == []


def test_a_configuration_travels_through_an_experiment_file() -> None:
    from experiments.config import build_run
    from experiments.tree import to_tree

    lora = LoraConfig(rank_pattern={"q_proj": 4}, layers_to_transform=(0, 2), use_dora=True)
    tree = {"lora": to_tree(lora)}
    assert build_run(tree, "a file").lora == lora
