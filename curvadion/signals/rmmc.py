"""gate="rmmc": relative maximum momentum change, the largest | ||m_t|| - ||m_{t-1}|| | / ||m_{t-1}||"""

from torch import Tensor

from curvadion.gate.schedule import Plan
from curvadion.rules.base import Step
from curvadion.signals.base import Reading, Signal, measure


class Rmmc(Signal):
    """Opens when a matrix exceeds its group's tau. The kernel that makes the key does it all."""

    def read(self, step: Step, message: Tensor, taus: list[float], plan: Plan) -> Reading:
        return measure(step, message, taus, plan)
