"""What a run costs, as formulas: bytes on a GPU by ZeRO stage, bytes that travel, and bytes of activations.

Parallel training here replicates the experts and shards their optimizer's state (ZeRO: Rajbhandari et al. 2020, arXiv
1910.02054, sec. 5); ZeRO-3 shards the frozen base as well. N is the number of GPUs. Not counted: the CUDA context,
buffers of the communication library, fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STAGES", "Activations", "Memory", "Weights", "expert_parallel_bytes", "memory", "traffic"]

STAGES = ("ZeRO-0 (DDP)", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3, offload")
MASTER = 12  # DeepSpeed's bytes for each trained parameter: a float32 copy of it and Adam's two float32 moments


@dataclass(frozen=True)
class Weights:
    """Bytes of a converted model's parameters.

    ``base`` and ``largest_part``: the frozen base, and its largest repeated layer or single module. ``frozen`` and
    ``trained``: experts, routers and saved modules, as they are stored; ``frozen_count`` and ``trained_count``: their
    numbers of parameters. ``item``: bytes of one of them when DeepSpeed casts it to the base's half precision.
    """

    base: int
    largest_part: int
    frozen: int
    trained: int
    frozen_count: int
    trained_count: int
    item: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by what holds them, and on its host."""

    stage: str
    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def gpu(self) -> int:
        """All of them but the host's."""
        return self.base + self.adapters + self.gradients + self.optimizer + self.activations


def memory(w: Weights, gpus: int, activations: int, cast: bool = False) -> tuple[Memory, ...]:
    """Bytes on each GPU for every stage of :data:`STAGES`.

    ZeRO-0 is data parallelism with torch's AdamW: adapters, gradients and two moments as stored (16 bytes for a float32
    parameter). ZeRO-1 shards DeepSpeed's state, 12 bytes a parameter: it keeps a float32 master copy of its own, also
    of float32 adapters. ZeRO-2 shards the gradients too. ZeRO-3 also shards the frozen base, and holds two of its
    largest parts whole, the one at work and the next; the experts stay whole (``stage3_param_persistence_threshold``
    above the largest of them). Offload keeps state and base on the host. ``cast``: the arguments say bf16 or fp16, with
    which ZeRO-1 and 2 cast the adapters, too; ZeRO-3 leaves them as they are.
    """
    adapters, gradients = w.frozen + w.trained, w.trained
    if cast:
        adapters, gradients = (w.frozen_count + w.trained_count) * w.item, w.trained_count * w.item
    state = _share(w.trained_count * MASTER, gpus)
    part, gathered = _share(w.base, gpus), min(2 * w.largest_part, w.base)
    whole, shard = w.frozen + w.trained, _share(w.trained, gpus)
    return (
        Memory(STAGES[0], w.base, whole, w.trained, 2 * w.trained, activations),
        Memory(STAGES[1], w.base, adapters, gradients, state, activations),
        Memory(STAGES[2], w.base, adapters, _share(gradients, gpus), state, activations),
        Memory(STAGES[3], min(part + gathered, w.base), whole, shard, state, activations),
        Memory(STAGES[4], gathered, whole, shard, 0, activations, host=part + state),
    )


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


def traffic(w: Weights, gpus: int, accumulation: int, cast: bool = False) -> tuple[tuple[str, int], ...]:
    """Bytes that one GPU sends in an optimizer step, for every stage, with ring algorithms.

    G: bytes of the gradients, B: of the base; ``f = (N - 1) / N``. ZeRO-0: all-reduce, ``2 f G``. ZeRO-1:
    reduce-scatter, and all-gather of the new weights, ``2 f G``. ZeRO-2 scatters after each of the ``accumulation``
    micro-steps. ZeRO-3: also ``2 f B`` a micro-step, the base gathered for the forward and for the backward pass
    (recomputed layers may gather once more). Offload's traffic to the host is not counted. ``cast``: as in
    :func:`memory`.
    """
    f, size = (gpus - 1) / gpus, w.trained_count * w.item if cast else w.trained
    gathered = f * w.trained * (accumulation + 1) + 2 * f * w.base * accumulation
    sent = (2 * f * w.trained, 2 * f * size, f * size * (accumulation + 1), gathered, gathered)
    return tuple((stage, round(value)) for stage, value in zip(STAGES, sent, strict=True))


def expert_parallel_bytes(widths: int, tokens: int, accumulation: int, item: int, gpus: int) -> int:
    """Bytes that one GPU would send in an optimizer step for its tokens if experts were spread over ``gpus`` instead.

    ``widths``: over all places where tokens would leave and return, choices per token times what travels, input and
    output width. Dispatch and combine, forward and backward: ``2 f T widths`` elements a micro-step, with T
    ``tokens`` and every expert equally likely.
    """
    return round(2 * (gpus - 1) / gpus * tokens * widths * item * accumulation)


@dataclass(frozen=True)
class Activations:
    """Widths that decide the size of what a forward pass keeps for the backward pass.

    Per token, in elements: ``hidden``, ``query``, ``key_value``, ``vocabulary``: the base's; ``middle``: the
    feed-forward width times the slots of its unit; ``ranks``: all ranks of all sites (times the slots where a site sees
    them); ``routed`` and ``logits``: inputs and outputs of all routers; ``dropped``: inputs of all sites with dropout.
    ``item``: bytes of one element of the base. Whatever the number of tokens: ``packed``, bytes of the copies of
    experts with frozen ranks; ``stacked``, elements of all adapted parameters with experts of the base, and
    ``largest_stack``, of the largest of them.
    """

    layers: int
    hidden: int
    query: int
    key_value: int
    middle: int
    vocabulary: int
    ranks: int
    routed: int
    logits: int
    dropped: int
    item: int
    packed: int = 0
    stacked: int = 0
    largest_stack: int = 0

    def bytes(self, tokens: int, checkpointing: bool) -> int:
        """An estimate for a micro-batch of ``tokens``; attention as one fused operator.

        A layer: ``item (2 hidden + 2 query + 2 key_value + 4 middle) + 8 hidden`` (normed inputs; q, k, v and the
        output; gate, up, their activation and product; two float32 norms). Experts: ``item ranks + 16 logits +
        (item + 1) dropped``, and ``4 routed``, a float32 copy, on a half-precision base. The model's logits:
        ``vocabulary (item + 8)``. With checkpointing: every layer's input, and one layer and its experts at a time.
        Experts with frozen ranks: ``packed``, the copies of A and B beside them that a forward makes. Stacked experts
        of the base: their adapted copies, and the largest's gradient, ``item (stacked + largest_stack)``. Of copies a
        layer's at a time with checkpointing.
        """
        base = self.item * (2 * self.hidden + 2 * self.query + 2 * self.key_value + 4 * self.middle) + 8 * self.hidden
        copied = 4 * self.routed if self.item < 4 else 0
        experts = self.item * self.ranks + copied + 16 * self.logits + (self.item + 1) * self.dropped
        layers, copies = self.layers * base + experts, self.packed + self.item * self.stacked
        if checkpointing:
            layers = self.layers * self.item * self.hidden + -(-layers // self.layers)
            copies = -(-copies // self.layers)
        return tokens * (layers + self.vocabulary * (self.item + 8)) + copies + self.item * self.largest_stack
