"""Which implementation runs: one table of data, asked once per call.

`implementation=None` lets this table choose, by the machine and the number of rows; a name is taken
at its word, and refused in one sentence where it cannot run. Nothing falls back silently:
`which_implementation` answers beforehand what a call would run.

The machine is the card of the mesh in scope (so that a program compiled for a card that is not
here, under `jax.sharding.use_abstract_mesh`, is planned for that card), else JAX's default backend.
"""

import jax

IMPLEMENTATIONS = ("xla", "triton", "mosaic_gpu", "jax_triton")


def target() -> str:
    """The kind of device that programs traced now are for: "cpu", "tpu …" or a card's name."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh is None or mesh.empty else getattr(mesh, "abstract_device", None)
    if device is not None:
        return str(device.device_kind)
    return str(jax.devices()[0].device_kind)


def check_name(implementation: str | None) -> None:
    """Refuse a name that is not an implementation at all."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; expected None or one of {list(IMPLEMENTATIONS)}"
        )
