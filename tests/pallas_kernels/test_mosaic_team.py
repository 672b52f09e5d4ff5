"""The Hopper team kernel's lane programs on NumPy: what a team leaves in its room.

Who waits for whom is in `test_mosaic_interpreted`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout, MatmulConfig, nf4_dequantize
from pallas_kernels.codebooks import DYNAMIC_SIGNED
from pallas_kernels.nf4_matmul import mosaic_team, mosaic_team_lanes
from pallas_kernels.nf4_matmul.mosaic_ring import load_offset
from pallas_kernels.nf4_matmul.mosaic_team_lanes import GROUP, PIECES, ROOM, Plan
from tests.pallas_kernels.test_mosaic_gemv import problem
from tests.pallas_kernels.test_mosaic_matmul import machine_of

CONFIG = MatmulConfig(rows=64, stages=4, team=True)


def of_room(plan, place):
    """A group's weights by row of yᵀ's tile and contracted index, out of the order they lie in."""
    fragment = np.arange(16)
    # Row g of 16 is 2g, row g + 8 is 2g + 1.
    actual = 2 * (fragment % 8) + fragment // 8
    order = np.argsort(actual) + 16 * np.arange(8)[:, None]
    return (place.T if plan.transposed else place)[order.reshape(-1)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("members", "n", "contracted", "dtype", "double_quant"),
    [
        (8, 192, 1280, "bfloat16", True),  # the last tile and the last group are short
        (12, 128, 1024, "float16", False),  # 2 blocks a thread, of which some have none
        (20, 256, 2048, "bfloat16", True),  # more threads than blocks
    ],
)
def test_a_team_decodes_a_group_once(transposed, members, n, contracted, dtype, double_quant):
    """Its members' shares together are the group, with the reference's bits; no other place in any
    room is touched."""
    shape = (contracted, n) if transposed else (n, contracted)
    rng = np.random.default_rng(members)
    (_, codes, absmax, nested, offset, _, _), _ = problem(rng, 1, *shape, dtype, double_quant)
    second = (nested, offset[0]) if double_quant else ()
    weight = nf4_dequantize(
        *map(jnp.asarray, (codes, absmax, *second)),
        shape=shape,
        quant_type="nf4",
        blocksize=64,
        dtype=dtype,
        implementation="xla",
    )
    wanted = np.asarray(weight.T if transposed else weight).view(np.uint16)
    rows = 64 * (members - 1) + 1
    plan = Plan(rows, n, contracted, transposed, dtype, double_quant, False, CONFIG)
    assert (plan.members, plan.share * members >= GROUP) == (members, True)
    machine, (high, wide) = machine_of(CONFIG), plan.room_shape
    mean = load_offset(machine, plan, offset)
    for column in range(0, n, 128):
        for group in range(plan.groups):
            room = np.full((ROOM * high, wide), 0xFFFF, np.uint16)
            for member in range(members):
                at = [machine.word(i) for i in (member, column, group)]
                raw = mosaic_team_lanes.load_share(machine, plan, *at, codes, absmax, nested)
                scales = mosaic_team_lanes.scales_of_share(machine, plan, raw, mean)
                assert (len(raw) % 4, len(scales)) == (0, 4)
                if double_quant:  # product and sum each rounded, as NumPy does
                    scale = DYNAMIC_SIGNED[raw[8]] * raw[9].view(np.float32) + offset
                    np.testing.assert_array_equal(scales[0].view(np.float32), scale)
                for piece in range(PIECES):
                    where = (*at, machine.word(2), room)
                    mosaic_team_lanes.store_piece(machine, plan, piece, raw, scales, *where)
            places = room.reshape(ROOM, high, wide)
            assert (places[[0, 1, 3]] == 0xFFFF).all()
            inside = min(GROUP, plan.steps - group * GROUP) * 64
            found = of_room(plan, places[2])
            assert (found[:, inside:] == 0xFFFF).all()
            first = group * GROUP * 64
            part = wanted[column : column + 128, first : first + inside]
            np.testing.assert_array_equal(found[: len(part), :inside], part)


def test_there_are_as_many_teams_as_run_at_once_and_have_work():
    for rows, n, teams in ((20 * 64, 128 * 9, 6), (20 * 64, 256, 2), (132 * 64, 1024, 1)):
        plan = Plan(rows, n, 1024, False, "bfloat16", True, False, CONFIG)
        assert (plan.teams, plan.grid) == (teams, teams * plan.members)


def test_an_adapters_rows_stand_as_the_weights_do():
    b = np.arange(48 * 2).reshape(48, 2)
    place = mosaic_team_lanes.exchanged(np.arange(48))
    assert place[[0, 1, 2, 15, 16]].tolist() == [0, 8, 1, 15, 16]
    np.testing.assert_array_equal(mosaic_team._with_rows_exchanged(jnp.asarray(b))[place], b)


@pytest.mark.parametrize(
    ("rows", "contracted", "cores"),
    [(448, 1024, None), (133 * 64, 1024, None), (1024, 960, None), (1024, 1024, 100)],
)
def test_what_a_team_cannot_do_is_refused(monkeypatch, rows, contracted, cores):
    if cores:
        device = type("Device", (), {"core_count": cores})()
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
    layout = Layout((1024, contracted), "nf4", 64, double_quant=False)
    weight = (jnp.zeros((1024, contracted // 2), jnp.uint8), jnp.ones(16 * contracted), None, None)

    def run(x):
        return mosaic_team.multiply_in_teams(x, *weight, layout=layout, config=CONFIG)

    with pytest.raises(ValueError, match="take team=False"):
        jax.eval_shape(run, jax.ShapeDtypeStruct((rows, contracted), jnp.bfloat16))
