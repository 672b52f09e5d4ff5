"""Will it fit? A step's bytes by component, from the compiler, against a card's memory.

The totals are XLA's own: arguments, outputs and temporaries of the compiled step. They are split
by what JAX knows of the program: the arguments by which part of the training state they are, the
temporaries into gradients (one array for each trained parameter, or one layer's where layers are
updated in the backward pass; float32 sums beside them where micro-batches accumulate), activations
(what the forward pass saves for the backward pass) and the rest, which is what a layer needs while
it runs. The split always adds up to XLA's total.
"""

import dataclasses
from pathlib import Path

import jax
from jaxtyping import PyTree

from pallas_kernels.cards import Card, find_card
from qlora_jax.models import AttentionName, attention_for, capability_here, is_stacked
from qlora_jax.models.streaming import HOST_LIMIT, host_limit_for
from qlora_jax.plan.compiled import ProgramBytes, cudnn_available, program_bytes
from qlora_jax.plan.devices import mesh_of, traced_for, with_cut_weights
from qlora_jax.plan.shapes import find_config
from qlora_jax.plan.workload import Step, Workload, host_bytes, training_step, tree_bytes
from qlora_jax.train import HostTraffic, host_traffic

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
    """A training step's memory on one card, of several on each. All sizes in bytes."""

    work: Workload
    card: str | None
    """A key of CARDS; None for this process's default device."""
    memory: int | None
    """Of the card; None where it is not known."""
    device: Components
    host: int
    """In pinned host memory."""
    traffic: HostTraffic
    """What crosses the bus in one step."""
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


def plan(
    work: Workload | str | Path, card: str | Card | None = None, *, memory: int | None = None
) -> Plan:
    """Compile a training step for a card, which need not be here, and add it up.

    Args:
        work: what is trained; of a model's name or folder alone (`find_config`), the paper's way of
            finetuning it: NF4, r=64 on all linear layers, paged AdamW, one example of 512 tokens.
        card: a name of CARDS; None for this process's default device.
        memory: bytes of device memory; None takes the card's own, or what the present device says.

    Raises:
        RuntimeError: XLA's GPU compiler is not installed; says how to get it.
        ValueError: an unknown card or model.
    """
    target = find_card(card) if isinstance(card, str) else card
    if not isinstance(work, Workload):
        work = Workload(find_config(work))
    work, notes = _for_target(work, target)
    mesh = mesh_of(target, work.devices) if work.devices > 1 else None
    step = training_step(work, target, present=target is None, mesh=mesh)
    found = program_bytes(step.program, target)
    if memory is None:
        memory = device_memory() if target is None else target.memory
    return Plan(
        work=work,
        card=None if target is None else target.name,
        memory=memory,
        device=_components(work, step, found),
        host=found.host,
        traffic=_traffic(work, step, target),
        notes=(*notes, *_about_the_host(found.host * work.devices)),
    )


def _traffic(work: Workload, step: Step, card: Card | None) -> HostTraffic:
    """Of one card."""
    alone = step if work.devices == 1 else training_step(work.of_one_device, card)
    with traced_for(card, 1):
        traffic = host_traffic(alone.program.fn, *alone.placed)
    cut = work.cut_weights and work.devices > 1
    return with_cut_weights(traffic, work.devices) if cut else traffic


def device_memory() -> int | None:
    """Bytes that the allocator of the default device can give; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _about_the_host(needed: int) -> list[str]:
    enough = host_limit_for(needed)
    if enough is None:
        return []
    return [
        f"pinned host: {needed / 2**30:.0f} GiB is more than JAX's pool holds: set "
        f"{HOST_LIMIT}={enough} in the environment before JAX starts, on a machine with that much."
    ]


def _for_target(work: Workload, card: Card | None) -> tuple[Workload, tuple[str, ...]]:
    """The workload with attention and matmul named for the card, and what there is to say."""
    if card is None:
        here = work.attention or _attention(work, jax.default_backend(), capability_here())
        return dataclasses.replace(work, attention=here), ()
    notes = []
    attention, matmul = work.attention, work.matmul
    if attention == "cudnn" and not cudnn_available():
        raise ModuleNotFoundError(
            "attention is 'cudnn', which only cuDNN compiles: pip install --no-deps "
            "nvidia-cudnn-cu13 (0.9 GB), or leave it to the card."
        )
    if attention is None:
        attention = _attention(work, "cuda", card.compute_capability)
        newer = _attention(work, "cuda", None)
        if attention != newer:
            notes.append(
                f"attention: {attention}, since cuDNN's needs sm_80 and this card is {card.arch}."
            )
        elif attention == "cudnn" and not cudnn_available():
            attention = "chunked"
            notes.append(
                "attention: chunked; training takes cuDNN's, which needs about as much. To plan "
                "that: pip install --no-deps nvidia-cudnn-cu13 (0.9 GB)."
            )
        elif attention != "cudnn":
            notes.append(f"attention: {attention}, since cuDNN's does not take this model.")
    if matmul is None and work.quant is not None:
        if not card.supports_triton:
            matmul = "xla"
            notes.append(f"matmul: xla, since the kernels need sm_80 and this card is {card.arch}.")
        elif card.pallas_kind != card.description:
            matmul = "xla"
            notes.append(
                f"matmul: xla, since Pallas does not know {card.description!r} by name: --matmul "
                "triton plans the kernels of its sibling."
            )
    if card.compute_capability < (8, 0) and work.compute_dtype == "bfloat16":
        notes.append(f"{card.description} computes bfloat16 in software: slow.")
    return dataclasses.replace(work, attention=attention, matmul=matmul), tuple(notes)


def _attention(work: Workload, platform: str, capability: tuple[int, int] | None) -> AttentionName:
    """What `load_model` asks for on such a target."""
    config = work.config
    return attention_for(
        platform,
        work.compute_dtype,
        config.head_dim,
        softcap=getattr(config, "attn_logit_softcapping", None),
        bias=getattr(config, "score_bias", False),
        alibi=getattr(config, "alibi", False),
        packed=work.packed,
        longest=work.sequence if work.target_length is None else None,
        compute_capability=capability,
    )


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
        [step.frozen[name] for name in ("embed_tokens", "shared", "lm_head") if name in step.frozen]
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
    state_kinds, frozen_kinds = step.kinds
    moments = host_bytes(step.opt_state, state_kinds.opt_state)
    base = tree_bytes(step.frozen) - embeddings - host_bytes(step.frozen, frozen_kinds)
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
