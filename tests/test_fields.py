"""Options that hold another kind of value are refused where they are given, by name."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.generate import GenerationConfig
from qlora_jax.train import TrainConfig

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.parametrize(
    ("make", "field", "value", "wanted"),
    [
        (ql.QuantConfig, "double_quant", "no", "a truth value"),
        (ql.LoraConfig, "r", True, "a whole number"),
        (ql.LoraConfig, "use_dora", "yes", "a truth value"),
        (ql.LoraConfig, "loftq_iter", 1.5, "a whole number"),
        (ql.LoraConfig, "lora_dropout", "0.1", "a number"),
        (ql.LoraConfig, "target_modules", 3, "names, one or several"),
        (ql.LoraConfig, "exclude_modules", (3,), "names, one or several"),
        (ql.LoraConfig, "modules_to_save", 3, "names, one or several"),
        (ql.LoraConfig, "layers_to_transform", "0", "numbers of layers, one or several"),
        (GenerationConfig, "max_new_tokens", 2.5, "a whole number"),
        (GenerationConfig, "top_k", 2.5, "a whole number"),
        (GenerationConfig, "top_p", True, "a number"),
        (GenerationConfig, "temperature", "0.7", "a number"),
        (GenerationConfig, "eos_token_ids", "2", "ids, one or several"),
        (GenerationConfig, "eos_token_ids", None, "ids, one or several"),
        (GenerationConfig, "stop", 3, "texts, one or several"),
        (TrainConfig, "max_grad_norm", "1e-1", "a number"),
    ],
)
def test_an_option_of_another_kind(make, field, value, wanted):
    message = re.escape(f"{field}={value!r} must be {wanted}")
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**{field: value})


def test_a_list_is_no_data_type():
    with pytest.raises(ValueError, match=r"quant_type is \['nf4'\]; choose one of"):
        ql.QuantConfig(["nf4"])


def test_numbers_of_numpy_are_taken():
    config = GenerationConfig(max_new_tokens=np.int64(8), top_k=np.int32(2), top_p=np.float32(0.5))
    assert config == GenerationConfig(max_new_tokens=8, top_k=2, top_p=0.5)
    assert GenerationConfig(eos_token_ids=np.int32(2)).eos_token_ids == (2,)
    assert GenerationConfig(eos_token_ids=np.array([1, 2])).eos_token_ids == (1, 2)
    lora = ql.LoraConfig(r=np.int64(4), layers_to_transform=np.int64(1), lora_dropout=0)
    assert lora == ql.LoraConfig(r=4, layers_to_transform=(1,))
    assert ql.QuantConfig(blocksize=np.int64(64), double_quant=np.True_) == ql.QuantConfig()
    assert ql.quantize(jnp.ones((2, 64)), ql.QuantConfig(double_quant=np.False_)).offset is None
