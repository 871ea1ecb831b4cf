"""Which paths run where: streamed batches over devices, merged exactly."""

from qpo_sim.compute.partial import Partial
from qpo_sim.compute.run import Progress, Run, run

__all__ = ["Partial", "Progress", "Run", "run"]
