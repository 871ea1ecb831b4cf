"""Market models: one pure step function per component, composed into the first stages of the simulation line."""

from qpo_sim.market.model import Market, prepare
from qpo_sim.market.presets import gbm, regime_student_t

__all__ = ["Market", "gbm", "prepare", "regime_student_t"]
