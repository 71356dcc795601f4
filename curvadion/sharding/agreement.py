"""Do all ranks agree on what must be common: the step, the options, the parameters, the weights?"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from curvadion.sharding.dry import has_no_values
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.layout import is_dense, local_tensor
from curvadion_kernels.reference import CHECK_KEY, FAILED_KEY, OUTSIDE_KEY

logger = logging.getLogger("curvadion.optimizer")

ANOTHER = "another rank has refused it"
LOADS = 1 << 40  # more than the steps of any run: ranks that load and ranks that check take notice

Gradients = Sequence[tuple[str, Tensor | None]]


class ReplicaMismatchError(RuntimeError):
    """Ranks disagree on what must be common: weights at the start, options, the list of parameters, or the
    step."""


class Agreement:
    """Compares all ranks on the first step, after whatever may have changed something, and every so often.

    Args:
        every: steps between checks; 0 for none but the first.
        refuse_equal_gradients: raise, not warn, if all replicas have the same gradients.
        lag: whether replicas read the gate's key in the step after.
    """

    def __init__(self, every: int, *, refuse_equal_gradients: bool = False, lag: bool = False):
        self._every, self._lag = every, lag
        self._refuse_equal_gradients = refuse_equal_gradients
        self.pending = True
        self._weights_due = False
        self.first = True  # nobody has done anything but construct it

    def check_if_due(
        self,
        exchange: Exchange,
        step: int,
        config: Callable[[], str],
        weights: Callable[[], Mapping[str, Tensor]],
        gradients: Callable[[], Gradients],
    ) -> None:
        """`check`, where it is due; of weights, at the next step on which there are some to compare; of
        gradients, on the first step and after whatever may have changed something."""
        due = self.pending or (self._every > 0 and step % self._every == 0)
        self._weights_due |= due
        common = weights() if self._weights_due else {}
        if due or common:
            self.check(exchange, step, config, common, gradients() if self.pending else ())
            self._weights_due &= not common
        if due:
            self.pending = False

    def check(
        self,
        exchange: Exchange,
        step: int,
        config: Callable[[], str],
        weights: Mapping[str, Tensor],
        gradients: Gradients,
    ) -> None:
        """Raise on every rank if ranks disagree, or nobody has a gradient; a collective.

        Args:
            step: steps taken so far.
            config: returns a text of all that must be equal on all ranks.
            weights: what must be equal in all replicas by now, by name; none where nothing must be.
            gradients: of all parameters, with their names; nothing where there need be none.

        Raises:
            ReplicaMismatchError: ranks disagree, or gradients agree that must not.
            RuntimeError: no rank has a gradient.
        """
        self._announce(exchange)
        hashes, seen, hashed, failure = list[int](), 1, 0, None
        try:  # whatever is wrong here alone, the others wait for this rank
            text = config()
            hashes = [hash_tensors([t]) for t in weights.values()]
            if gradients:
                seen, hashed = look_at(gradients, hashed=exchange.replicas > 1)
        except Exception as error:
            text, failure = repr(error), error
        texts = hash_text(text), hash_text(repr(hashes))
        different = exchange.agree(step, *texts, seen=seen, gradients=hashed)
        if different and failure is not None:
            raise failure
        if "step" in different:
            raise ReplicaMismatchError(
                "all ranks must be at the same step, and at step() or at synchronize(); this one is in "
                f"{exchange.place}, another is not; load the same checkpoint everywhere, and call step() on "
                "every rank or on none"
            )
        if "config" in different:
            raise ReplicaMismatchError(
                "all ranks must construct CurvaDion with the same options and the same list of parameters, "
                "and freeze the same ones; they differ on some rank; compare the arguments, the parameter "
                "groups, the model, requires_grad, opt.kernels, torch's precision of float32 products and "
                "the versions of curvadion and torch on each of them"
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
        if "no gradient" in different:
            raise RuntimeError(
                f"some parameter must have a gradient in the first step; none of {len(gradients)} has one on "
                "any rank: they are no longer those of the model, which fully_shard(), DDP, .to() or a "
                "wrapper has replaced, or nobody called backward(); construct CurvaDion after the model is "
                "sharded, wrapped and moved, and call step() after backward()"
            )
        if "equal gradients" in different:
            message = (
                f"all {exchange.replicas} replicas have the same gradients, bit for bit, in the first step. "
                "Either somebody averages them across replicate_mesh already, and nothing is saved: wrap the "
                "model neither in DistributedDataParallel nor over a mesh that has this axis (HSDP), but "
                "shard it over the ranks of one replica. Or all replicas read the same data: give each its "
                "own."
            )
            if self._refuse_equal_gradients:
                raise ReplicaMismatchError(message)
            logger.warning(message)
        if lacking := [name for name, g in gradients if g is None]:
            logger.warning(
                "%d of %d parameters have no gradient here in the first step, which counts as zero: %s%s. If "
                "they should be trained, they are not the model's any more: construct CurvaDion after the "
                "whole model is sharded, wrapped and moved.",
                len(lacking),
                len(gradients),
                ", ".join(lacking[:5]),
                " and others" if len(lacking) > 5 else "",
            )

    def refusal(
        self, exchange: Exchange, failure: BaseException | None, steps: int, spoiled: Callable[[], bool]
    ) -> tuple[BaseException | None, bool]:
        """Return on every rank what to raise if one of them cannot load its checkpoint, or they are not of
        one step, and whether the state of one is spoiled then; a collective.

        Where all load, a second collective follows a refusal; a rank that does something else takes part in
        the first alone, and then only this rank's own state counts.

        Args:
            failure: what is wrong with that of this rank.
            steps: steps that it counts.
            spoiled: says whether this rank's state is not what a step leaves; asked after a refusal.
        """
        others = (
            f"a checkpoint must be loaded by all ranks or by none; {ANOTHER}, or is at something else; "
            "its own error says which; nothing has changed here either"
        )
        try:
            self._announce(exchange)
        except ReplicaMismatchError as error:
            raise failure or error from None
        different = exchange.agree(LOADS, 0 if failure else 1 + steps, 0)
        if "step" in different:  # somebody does not load, and will raise now
            return failure or ValueError(others), spoiled()
        if failure is None and not different:
            return None, False
        here = spoiled()
        different = exchange.agree(LOADS, 2 if here else 1, 0, seen=1 if failure else 0)
        if failure is None:
            failure = ValueError(
                f"all ranks must load the same checkpoint; this one's counts {steps} steps, another's "
                "another number; nothing has changed; load the files of one save"
                if "no gradient" in different  # seen: a failure
                else others
            )
        return failure, here or "config" in different

    def _announce(self, exchange: Exchange) -> None:
        """Begin together: ranks of a replica in the store, replicas by a key, which may meet one of a step.

        In the store not the first time, when every rank of a replica begins with a check.
        """
        if not self.first:
            exchange.meet("a check that all ranks agree")
        self.first = False
        if exchange.replicas > 1 and (told := exchange.announce_check()) != CHECK_KEY:
            self.refuse_to_go_alone(exchange, told)

    def refuse_to_go_alone(self, exchange: Exchange, told: int) -> None:
        """Raise, as do the replicas that said `told` in the gate's place: they are at something else."""
        if told == FAILED_KEY:
            if not self._lag:
                all_refuse(exchange, -1, False)
            raise RuntimeError("another rank could not do its part of step(); its own error says why")
        if told == OUTSIDE_KEY:
            exchange.announce_check()
        if told != OUTSIDE_KEY + 1:  # who met a NaN raises by itself
            exchange.agree(-1, 0, 0)  # no number of steps, so that they notice
        at = "synchronize()" if told >= OUTSIDE_KEY else "a check, after a load, a new group or synchronize()"
        raise ReplicaMismatchError(
            "all ranks must call step() and synchronize() equally often, and whatever else is of all ranks; "
            f"this one is in {exchange.place}, another is at {at}; give every replica as many batches"
        )


def all_refuse(exchange: Exchange, steps: int, mine: bool) -> bool:
    """Say whether every rank refuses the same step, `mine` being whether this one does: a collective of all
    who read FAILED_KEY, in a step or not. With gate_lag some read it a step later, so nobody calls it then.
    """
    return not exchange.agree(steps, int(mine), 0) and mine


def look_at(gradients: Gradients, *, hashed: bool) -> tuple[int, int]:
    """Return whether this rank has no gradient (0), one that is not zero (2) or neither (1), and a hash of
    all of them if wanted; what is no gradient for the optimizer, as is a sparse one, is passed over."""
    present = [local_tensor(g) for _, g in gradients if g is not None]
    if not present:
        return 0, 0
    dense = [g for g in present if is_dense(g) and g.is_floating_point() and g.itemsize > 1]
    if not hashed or any(map(has_no_values, dense)) or not any(bool(g.any()) for g in dense):
        return 1, 0
    return 2, hash_tensors(dense)


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
