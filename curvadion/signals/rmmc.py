"""gate="rmmc": relative maximum momentum change, the largest | ||m_t|| - ||m_{t-1}|| | / ||m_{t-1}|| of all."""

from curvadion.signals.base import Signal


class Rmmc(Signal):
    """Opens when a matrix exceeds its group's tau. The kernel that makes the key does it all."""
