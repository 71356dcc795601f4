"""What the gate looks at: one file each, and one entry of SIGNALS."""

from curvadion.signals.base import Reading, Signal, measure
from curvadion.signals.drift import Drift
from curvadion.signals.rmmc import Rmmc

# The names of `gate`.
SIGNALS: dict[str, type[Signal]] = {"rmmc": Rmmc, "drift": Drift}

__all__ = ["SIGNALS", "Reading", "Signal", "measure", "register_signal"]


def register_signal(name: str, signal: type[Signal]) -> None:
    """Make a signal known as `gate=name`, on every rank and before an optimizer is built.

    Raises ValueError if the name is taken.
    """
    if name in SIGNALS:
        raise ValueError(f"a signal's name must be new; got {name!r}, which there is already; choose another")
    SIGNALS[name] = signal
