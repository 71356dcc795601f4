"""gate="rmmc": the relative maximum momentum change, max over matrices of | ||m_t|| - ||m_{t-1}|| | / ||m_{t-1}||."""

from curvadion.signals.base import Signal


class Rmmc(Signal):
    """Opens when a matrix exceeds its group's tau. The kernel that makes the key does it all."""
