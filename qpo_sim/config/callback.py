"""What Hydra calls before a run begins."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qpo_sim.config.compose import to_config
from qpo_sim.errors import InputError


class RejectedError(BaseException):
    """Bad options, found before anything was written; `str` is the sentence for the user.

    Not an Exception, because Hydra turns those of a callback into warnings and runs on.
    """


class CheckBeforeRun(Callback):
    """Checks the options of a single run before Hydra creates the run's folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises RejectedError where the options are not good."""
        try:
            to_config(config)
        except InputError as error:
            raise RejectedError(str(error)) from error
