"""Price tables: read, check, align, turn into log-returns.

`load_prices()` gives the daily closes that ship with the package (see `embedded/NOTICE`);
`load_prices(path)` reads the user's own.
"""

from qpo_sim.data.prices import EMBEDDED_FINGERPRINT, fingerprint, load_prices, log_returns, step_hours

__all__ = ["EMBEDDED_FINGERPRINT", "fingerprint", "load_prices", "log_returns", "step_hours"]
