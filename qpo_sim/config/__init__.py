"""The options of a run: their schema, how they are composed from `conf/`, and the checks at the border."""

from qpo_sim.config.check import Timeline, check, check_assets, timeline
from qpo_sim.config.compose import conf_folder, load, to_config, user_cache_folder
from qpo_sim.config.schema import (
    BookConfig,
    CalibrationConfig,
    ComputeConfig,
    Config,
    DataConfig,
    DriftConfig,
    GbmMarket,
    LimitConfig,
    LoanAccount,
    MarketConfig,
    OptimizerConfig,
    PerpetualAccount,
    RegimeStudentTMarket,
    ReportConfig,
    RiskConfig,
    SimulationConfig,
)

__all__ = [
    "BookConfig",
    "CalibrationConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DriftConfig",
    "GbmMarket",
    "LimitConfig",
    "LoanAccount",
    "MarketConfig",
    "OptimizerConfig",
    "PerpetualAccount",
    "RegimeStudentTMarket",
    "ReportConfig",
    "RiskConfig",
    "SimulationConfig",
    "Timeline",
    "check",
    "check_assets",
    "conf_folder",
    "load",
    "timeline",
    "to_config",
    "user_cache_folder",
]
