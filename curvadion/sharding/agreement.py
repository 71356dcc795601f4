"""Do all ranks agree on what must be common: the step, the options, the parameters, the weights?"""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from curvadion.sharding.dry import has_no_values
from curvadion.sharding.exchange import Exchange


class ReplicaMismatchError(RuntimeError):
    """Ranks disagree on what must be common: weights at the start, options, the list of parameters, or the
    step."""


class Agreement:
    """Compares all ranks on the first step, after whatever may have changed something, and every so often.

    Args:
        every: steps between checks; 0 for none but the first.
    """

    def __init__(self, every: int):
        self._every = every
        self.pending = True
        self._weights_due = False

    def check_if_due(
        self,
        exchange: Exchange,
        step: int,
        config: Callable[[], str],
        weights: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """`check`, where it is due; of weights, at the next step on which there are some to compare."""
        due = self.pending or (self._every > 0 and step % self._every == 0)
        self._weights_due |= due
        common = weights() if self._weights_due else {}
        if due or common:
            self.check(exchange, step, config, common)
            self._weights_due &= not common
        if due:
            self.pending = False

    def check(
        self, exchange: Exchange, step: int, config: Callable[[], str], weights: Mapping[str, Tensor]
    ) -> None:
        """Raise `ReplicaMismatchError` on every rank if ranks disagree; a collective.

        Args:
            step: steps taken so far.
            config: returns a text of all that must be equal on all ranks.
            weights: what must be equal in all replicas by now, by name; none where nothing must be.
        """
        hashes = [hash_tensors([t]) for t in weights.values()]
        different = exchange.agree(step, hash_text(config()), hash_text(repr(hashes)))
        if "config" in different:
            raise ReplicaMismatchError(
                "all ranks must construct CurvaDion with the same options and the same list of parameters; "
                "they differ on some rank; compare the arguments, the parameter groups, the model, "
                "opt.kernels and torch's precision of float32 products on each of them"
            )
        if "step" in different:
            raise ReplicaMismatchError(
                f"all ranks must be at the same step; this one has taken {step}, another a different "
                "number; load the same checkpoint everywhere, and call step() on every rank or on none"
            )
        if "weights" in different:
            names = [list(weights)[k] for k in exchange.differing(hashes)]
            which = f"{', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"
            if step:
                raise ReplicaMismatchError(
                    "replicas must hold equal weights after a synchronized step or a load, and an equal X_0 "
                    f"and U always; after {step} steps they differ in {which}; if a checkpoint was loaded, "
                    "load the same model and optimizer everywhere; if hardware or shard layouts differ "
                    "between replicas, so does rounding: construct with check_every=0"
                )
            raise ReplicaMismatchError(
                "replicas must hold equal weights here (FSDP does not compare or broadcast across "
                f"replicate_mesh); they differ in {which}; seed every replica alike, load the same "
                "checkpoint, or call opt.broadcast_parameters() before the first step"
            )

    def refuse_to_step_alone(self, exchange: Exchange, step: int, config: Callable[[], str]) -> None:
        """Raise, as do the replicas that are at `synchronize()` while this one takes a step."""
        exchange.agree(-1, hash_text(config()), 0)  # no number of steps, so that they notice
        raise ReplicaMismatchError(
            "all ranks must call step() and synchronize() equally often; this one takes a step after "
            f"{step}, another is at synchronize(); give every replica as many batches"
        )


def hash_text(text: str) -> int:
    """Return 62 bits that tell texts apart, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2


def hash_tensors(tensors: Iterable[Tensor], chunk: int = 1 << 22) -> int:
    """Return 62 bits that tell the tensors' contents apart: a weighted sum of their bits modulo 2^64, on
    their device.

    0 for no tensors, and in a dry run.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [t.contiguous().view(integer[t.element_size()]).reshape(-1) for t in tensors]
    if not tensors or has_no_values(tensors[0]):
        return 0
    longest = min(chunk, max(t.numel() for t in tensors))
    weights = torch.arange(longest, device=tensors[0].device).mul_(0x9E3779B97F4A7C1).add_(1).bitwise_or_(1)
    total = 0
    for number, bits in enumerate(tensors):
        for part in bits.split(chunk):
            mixed = (part.to(torch.int64) + 0x2545F4914F6CDD1) * weights[: part.numel()]
            total = hash((total, number, int((mixed ^ (mixed >> 29)).sum())))
    return total & ((1 << 62) - 1)
