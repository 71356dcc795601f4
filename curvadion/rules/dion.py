"""local_update="dion", the released code's rule, and Dion's synchronized step, which is the same with
means."""

from collections.abc import Iterator, Sequence
from functools import partial

from curvadion.algebra.power_iteration import Factors, pieces, power_iteration
from curvadion.algebra.sizes import piece_elements
from curvadion.rules.base import Rule, Step, local_lr, scale, shrinkage
from curvadion.rules.factors import factors_by_owners, has_owner
from curvadion.rules.left_factor import orthonormalize
from curvadion.sharding.owners import Stack
from curvadion.state.batch import Batch


class Dion(Rule):
    """A low-rank orthonormalized update with what it leaves out kept in the momentum.

    P   = orthogonalize(m_i Q),   R_i = m_i^T P
    M_i <- m_i - (1 - mu) P R_i^T  with error_feedback, else mu m_i
    Q   <- column_normalize(R)  or  orthogonalize(R)
    X   <- (1 - lr wd) X - lr_local scale P Q^T
    """

    uses_Q = uses_rank = True

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        dion_step(step, batches, synchronized=False)


def dion_step(step: Step, batches: Sequence[Batch], *, synchronized: bool) -> None:
    """Do what `Dion` says on this replica alone; synchronized, with E_i[P], E_i[R] and lr in place of
    lr_local."""
    means = synchronized and step.exchange.replicas > 1
    total = sum(len(b.members) for b in batches if not b.layout.apart)  # the same on all ranks
    owned = [b for b in batches if not means and has_owner(step, b, total)]
    for b, f in factors_by_owners(step, owned) if owned else ():
        _move(step, b, f, synchronized=synchronized)
    others = [b for b in batches if all(b is not o for o in owned)]
    for chosen in _pieces(step, others, synchronized=synchronized):
        method = step.groups[chosen[0].group]
        left = partial(
            orthonormalize, step, chosen, method=method["orthogonalization"], synchronized=synchronized
        )
        factors = power_iteration(
            [b.M for b in chosen],
            [b.right_factor for b in chosen],
            columns=step.columns(chosen, synchronized=synchronized),
            orthonormal_P=left if step.crews(synchronized=synchronized) else None,
            reduce_P=step.reduction(
                chosen, [b.columns for b in chosen], synchronized=synchronized, live_only=True
            ),
            reduce_R=step.reduction(
                chosen, [b.rows for b in chosen], synchronized=synchronized, keep_own=True
            ),
            orthogonalization=method["orthogonalization"],
            right_factor=method["right_factor"],
            payload_dtype=step.payload_dtype if synchronized else None,
            column_sumsq=step.ops.column_sumsq,
        )
        for b, f in zip(chosen, factors, strict=True):
            _move(step, b, f, synchronized=synchronized)
    step.postpone_decay([b for b in batches if not step.groups[b.group]["error_feedback"]])
    for b in batches:
        b.common_Q = synchronized


def _move(step: Step, batch: Batch, f: Factors, *, synchronized: bool) -> None:
    """Take X, M and Q of a batch where its factors say."""
    group = step.groups[batch.group]
    feedback = group["error_feedback"]
    step.ops.low_rank_apply_(
        step.matrices(batch),
        batch.momentum if feedback else None,
        f.P,
        f.Q if f.scale is None else None,
        f.R,
        scale=f.scale,
        transposed=batch.layout.transposed,
        decay=shrinkage(group),
        step_size=(float(group["lr"]) if synchronized else local_lr(group))
        * scale(group, batch.layout.shape),
        feedback=1 - group["momentum"],
    )
    batch.right_factor.copy_(f.Q)


def _pieces(step: Step, batches: Sequence[Batch], *, synchronized: bool) -> Iterator[list[Batch]]:
    """Yield batches in lists for each of which `power_iteration` is called once: with one value of its
    options, and where no sum or mean has to serve all matrices at once, with few of them."""
    chosen: dict[tuple[str, str], list[Batch]] = {}
    for b in batches:
        group = step.groups[b.group]
        chosen.setdefault((group["orthogonalization"], group["right_factor"]), []).append(b)
    alone = step.owners.ranks == 1 and not (synchronized and step.exchange.replicas > 1)
    for key in sorted(chosen):
        if not alone:
            yield chosen[key]
            continue
        piece, size = list[Batch](), 0
        for k, b in enumerate(chosen[key]):
            elements = b.layout.shape[b.layout.long] * b.rank
            for start, stop in pieces(len(b.members), elements, b.momentum.device):
                added = (stop - start) * elements
                if piece and size + added > piece_elements(b.momentum.device.type):
                    yield piece
                    piece, size = [], 0
                piece.append(b.part(Stack(k, start, stop)))
                size += added
        yield piece
