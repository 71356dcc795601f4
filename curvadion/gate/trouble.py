"""What happens when a gradient is not finite or a rank cannot do its part: who raises what, and when."""

from collections.abc import Callable, Sequence

from torch import Tensor

from curvadion.gate.key import Decision
from curvadion_kernels.reference import FAILED_KEY, OUTSIDE_KEY

RELOAD = (
    "; the momentum has swallowed this step's gradients: load the last checkpoint (load_state_dict) before "
    "going on"
)
SPOILED = "the parameter "  # begins the names of what no later step can mend
MOST_SPOILED = 2  # steps skipped because of one, after which all raise


class NonFiniteError(RuntimeError):
    """A gradient held a NaN or an infinity, or a parameter that was to be sent to other replicas; raised on
    every rank in the same step, before anything is sent or moved."""


class Trouble:
    """The state of being in trouble. Every rank raises in the same step, or every rank goes on.

    In a step that asks the other replicas, all of them learn of it at once and `raise_or_skip`. In one that
    does not, the replica that met it stands still (`hold`) and tells the others when the gate asks next.

    Args:
        skip: whether a step with non-finite gradients is skipped rather than raised.

    Attributes:
        broken: why no step can be taken before a load, None if one can.
        overflow: what a GradScaler has found, None where none is at work; such a step is skipped.
        skipped_steps: by this replica, since construction.
    """

    def __init__(self, skip: bool):
        self._skip = skip
        self.skipped_steps = 0
        self.overflow: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all trouble: state was loaded."""
        self.broken: str | None = None
        self._clear()

    def _clear(self) -> None:
        self._held: str | None = None  # "failed" or "nonfinite": what this replica has to tell the others
        self._failure: Exception | None = None
        self._names: list[str] = []
        self._spoiled = 0  # steps skipped while a parameter was not finite

    def refuse_if_broken(self) -> None:
        """Raise if an earlier step left state that cannot be gone on from."""
        if self.broken:
            raise RuntimeError(self.broken)

    def begun(self) -> None:
        """From here on the momentum may hold this step's gradients: a step that does not come to its end is
        lost."""
        self.broken = f"an earlier step() did not come to its end{RELOAD}"

    def ended(self) -> None:
        """The step came to its end."""
        self.broken = None

    @property
    def skips(self) -> bool:
        """Whether a non-finite step is skipped: by option, or because a GradScaler is at work."""
        return self._skip or self.overflow is not None

    @property
    def held(self) -> str | None:
        """What this replica has to tell the others when the gate asks next: "failed", "nonfinite" or
        nothing."""
        return self._held

    @property
    def key(self) -> int:
        """The same as a gate key of a replica that is between steps."""
        return {None: OUTSIDE_KEY, "nonfinite": OUTSIDE_KEY + 1, "failed": FAILED_KEY}[self._held]

    def hold(self, decision: Decision, failure: Exception | None, names: Sequence[str]) -> None:
        """Note what this replica met in a step that asked nobody.

        Args:
            failure: what this rank could not do.
            names: parameters of this rank whose gradients are not finite.
        """
        if decision.failed or not self.skips:
            self._held = "failed" if decision.failed else self._held or "nonfinite"
            self._failure = self._failure or failure
            self._names = self._names or list(names)

    def _notice(self, parameters: list[str], before: int, steps: int) -> None:
        """Skipping mends no parameter: after MOST_SPOILED such steps have the others told of a failure."""
        self._spoiled = before + 1 if parameters else 0
        if self._spoiled >= MOST_SPOILED:
            self._held = "failed"
            self._failure = NonFiniteError(
                "skipping steps mends no parameter; got a NaN or an infinity in "
                f"{', '.join(parameters[:5])}, met in {self._spoiled} skipped steps, after {steps} steps; "
                "load the last checkpoint, or set it to finite values after the first skipped step"
            )

    def raise_or_skip(
        self,
        decision: Decision,
        failure: Exception | None,
        names: Callable[[], list[str]],
        *,
        steps: int,
        untouched: bool = False,
    ) -> None:
        """Raise on this rank as on every other, or return where the step is skipped. Parameters are untouched
        so far. Outside of a step there is none to skip.

        Args:
            failure: what this rank could not do.
            names: returns what is not finite on this rank: parameters, or those with such a gradient.
            steps: steps taken so far.
            untouched: no momentum of any rank has swallowed a gradient, because none could do its part.
        """
        failure, here, spoiled = failure or self._failure, self._names, self._spoiled
        self._clear()
        if decision.failed:
            if not self.skips:
                self.broken = None if untouched else f"an earlier step() failed on some rank{RELOAD}"
            if failure is not None:
                raise failure
            raise RuntimeError("another rank could not do its part of step(); its own error says why")
        if self.skips and decision.elsewhere is None:
            if self.overflow is None:
                self._notice([name for name in here or names() if name.startswith(SPOILED)], spoiled, steps)
            return
        self.broken = f"a NaN or an infinity was met in an earlier step(){RELOAD}"
        here = here or names()
        where = "on another rank, or a momentum whose squared norm overflows float32"
        if here:
            where = f"on this rank in {', '.join(here[:5])}{' and others' if len(here) > 5 else ''}"
        instead = "" if self.skips else ", or construct with on_nonfinite='skip' to skip such steps"
        raise NonFiniteError(
            f"gradients must be finite, and parameters that are sent; got a NaN or an infinity {where}, "
            f"after {steps} steps. Nothing was sent, and parameters are untouched{RELOAD}{instead}"
        )
