"""Will it fit? A step's bytes by component, from the compiler, against a card's memory.

The totals are XLA's own: arguments, outputs and temporaries of the compiled step. They are split
by what JAX knows of the program: the arguments by which part of the training state they are, the
temporaries into gradients (one array for each trained parameter, or one layer's where layers are
updated in the backward pass; float32 sums beside them where micro-batches accumulate), activations
(what the forward pass saves for the backward pass) and the rest, which is what a layer needs while
it runs. The split always adds up to XLA's total.
"""

import dataclasses

import jax
from jaxtyping import PyTree

from pallas_kernels.cards import Card, find_card
from qlora_jax.models import attention_for, is_stacked
from qlora_jax.plan.compiled import ProgramBytes, cudnn_available, program_bytes
from qlora_jax.plan.workload import Step, Workload, paged_bytes, training_step, tree_bytes

USABLE = 0.95
"""Part of a card's memory that a program can have: what XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives
it (JAX's own default is 0.75). The rest holds the driver's context, the libraries' handles and the
compiled kernels. What was planned for the H200 stayed within 0.2 GiB of the allocator's peak."""


@dataclasses.dataclass(frozen=True)
class Components:
    """Bytes on the device by what they hold."""

    base: int
    """Frozen weights of the layers, quantized or not, and their norms."""
    embeddings: int
    """Embedding and head."""
    adapters: int
    gradients: int
    optimizer: int
    """Optimizer state that lies on the device; the paged part is in `Plan.host`."""
    activations: int
    """What the forward pass saves for the backward pass."""
    temporaries: int
    """The rest of XLA's total: what a layer, the loss or the update needs while it runs."""

    @property
    def total(self) -> int:
        """XLA's total."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step's memory on one card. All sizes in bytes."""

    work: Workload
    card: str | None
    """A key of CARDS; None for this process's default device."""
    memory: int | None
    """Of the card; None where it is not known."""
    device: Components
    host: int
    """In pinned host memory."""
    notes: tuple[str, ...]
    """What was planned otherwise than it might run, and why."""

    @property
    def usable(self) -> int | None:
        """What of the card's memory a program can have."""
        return None if self.memory is None else int(USABLE * self.memory)

    @property
    def fits(self) -> bool | None:
        """Whether it does; None where the card's memory is not known."""
        return None if self.usable is None else self.device.total <= self.usable

    @property
    def spare(self) -> int | None:
        """Usable bytes left over; negative by how much is missing."""
        return None if self.usable is None else self.usable - self.device.total


def plan(work: Workload, card: str | Card | None = None, *, memory: int | None = None) -> Plan:
    """Compile the workload's training step for a card, which need not be here, and add it up.

    Args:
        work: what is trained.
        card: a name of CARDS; None for this process's default device.
        memory: bytes of device memory; None takes the card's own, or what the present device says.

    Raises:
        RuntimeError: XLA's GPU compiler is not installed; says how to get it.
        ValueError: an unknown card.
    """
    target = find_card(card) if isinstance(card, str) else card
    work, notes = _for_target(work, target)
    step = training_step(work)
    found = program_bytes(step.program, target)
    if memory is None:
        memory = device_memory() if target is None else target.memory
    return Plan(
        work=work,
        card=None if target is None else target.name,
        memory=memory,
        device=_components(work, step, found),
        host=found.host,
        notes=notes,
    )


def device_memory() -> int | None:
    """Bytes that the allocator of the default device can give; None where it does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _for_target(work: Workload, card: Card | None) -> tuple[Workload, tuple[str, ...]]:
    """The workload with attention and matmul named for the card, and what there is to say."""
    notes = []
    attention, matmul = work.attention, work.matmul
    if card is None:
        if attention is None:
            attention = attention_for(jax.default_backend(), work.compute_dtype, _head(work))
        return dataclasses.replace(work, attention=attention), ()
    if attention is None:
        attention = "chunked"
        if card.compute_capability < (8, 0):
            notes.append(
                f"attention: chunked, since cuDNN's flash attention does not run on {card.arch}."
            )
        elif attention_for("cuda", work.compute_dtype, _head(work)) != "cudnn":
            notes.append("attention: chunked, since cuDNN's does not take this model.")
        elif cudnn_available():
            attention = "cudnn"
        else:
            notes.append(
                "attention: chunked; training takes cuDNN's, which needs a little less. To plan "
                "that: pip install --no-deps nvidia-cudnn-cu13 (0.9 GB)."
            )
    if matmul is None and work.quant is not None and card.pallas_kind != card.description:
        matmul = "xla"
        notes.append(
            f"matmul: xla, since Pallas does not know {card.description!r} by name: --matmul "
            "triton plans the kernels of its sibling."
        )
    if card.compute_capability < (8, 0) and work.compute_dtype == "bfloat16":
        notes.append(f"{card.description} computes bfloat16 in software: slow.")
    return dataclasses.replace(work, attention=attention, matmul=matmul), tuple(notes)


def _head(work: Workload) -> int:
    return work.config.head_dim


def _gradients(work: Workload, lora: PyTree) -> int:
    """Bytes of the gradients that are there at once: of all layers, or of one."""
    if not work.train.update_in_backward:
        return tree_bytes(lora)
    leaves = jax.tree_util.tree_flatten_with_path(lora)[0]
    return sum(
        tree_bytes(leaf) // (leaf.shape[0] if is_stacked(path) else 1) for path, leaf in leaves
    )


def _components(work: Workload, step: Step, found: ProgramBytes) -> Components:
    embeddings = tree_bytes(
        [step.frozen[name] for name in ("embed_tokens", "lm_head") if name in step.frozen]
    )
    adapters = tree_bytes(step.lora)
    gradients = _gradients(work, step.lora)
    if work.train.gradient_accumulation_steps > 1:
        host_from = work.train.host_gradients
        gradients += sum(
            4 * leaf.size
            for leaf in jax.tree.leaves(step.lora)
            if host_from is None or leaf.size < host_from
        )
    # On the host lie paged optimizer state and, where weights stream, the layers' weights.
    moments = paged_bytes(work, step.opt_state)
    base = tree_bytes(step.frozen) - embeddings - (found.host_arguments - moments)
    temporaries = found.device - base - embeddings - adapters - gradients - step.saved
    optimizer = tree_bytes(step.opt_state) - moments
    return Components(
        base=base,
        embeddings=embeddings,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        activations=step.saved,
        temporaries=temporaries - optimizer,
    )
