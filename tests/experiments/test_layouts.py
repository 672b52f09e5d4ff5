"""How a run is laid out in time and memory changes nothing but rounding in what it computes.

Each option has tests of its own; here they are drawn together, on one run in float32.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.config import build_run
from experiments.run import execute

BASE = {
    "data": {"source": "describe", "validation_rows": 4, "max_rows": 16, "buckets": [128]},
    "lora": {"r": 2, "use_dora": True, "modules_to_save": ["norm"]},
    "train": {"steps": 2, "learning_rate": 1e-3, "max_grad_norm": None, "page_min_size": 0},
}
CUT = {"source_max_len": 96, "target_max_len": 32}


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, dict]:
    """The sections `model`, `train` and `devices`; the four rows of an update in every case."""
    rows, accumulation = draw(st.sampled_from([(4, 1), (2, 2)]))
    in_backward = accumulation == 1 and draw(st.booleans())
    streamed = draw(st.booleans())
    looped = in_backward or streamed
    policies = ("full", "offload") if looped else ("full", "offload", "attention", "dots", "none")
    return {
        "model": {
            "remat": draw(st.sampled_from(policies)),
            "stream_weights": streamed,
            "mlp_tile": draw(st.sampled_from([None, 32])),
            "attention": draw(st.sampled_from(["xla", "chunked"])),
            "loss_chunk": draw(st.sampled_from([None, 64])),
        },
        "train": {
            "micro_batch_size": rows,
            "gradient_accumulation_steps": accumulation,
            "update_in_backward": in_backward,
            "paged": draw(st.booleans()),
            "gradients_on_host": draw(st.booleans()),
        },
        "devices": {
            "count": draw(st.sampled_from([1, 2])),
            "weights": draw(st.sampled_from(["whole", "cut"])),
        },
    }


PLAIN = {
    "model": {"remat": "none", "attention": "xla", "loss_chunk": None},
    "train": {"micro_batch_size": 4, "paged": False},
    "devices": {},
}


def losses(model: Path, folder: Path, layout: dict[str, dict]) -> list[float]:
    """What a run logs: the held-out loss, the training steps', the held-out loss again."""
    tree = {name: BASE.get(name, {}) | section for name, section in layout.items()}
    tree["model"] |= {"source": str(model), "compute_dtype": "float32"}
    run = build_run(BASE | tree | {"data": BASE["data"] | CUT}, "the test")
    folder.mkdir()
    execute(run, folder, labels={})
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    found = losses(tiny_model, tmp_path_factory.mktemp("runs") / "plain", PLAIN)
    assert abs(found[0] - found[-1]) > 1e-3
    return found


@pytest.mark.slow
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts())
def test_losses_do_not_depend_on_the_layout(layout, plain, tiny_model, tmp_path_factory):
    found = losses(tiny_model, tmp_path_factory.mktemp("runs") / "run", layout)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
