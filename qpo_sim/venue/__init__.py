"""Margin and liquidation rules of venues. A rule is one file here; a venue is one YAML in conf/venue."""

import datetime
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.venue.health_factor import HealthFactor
from qpo_sim.venue.tiered_margin import TieredMargin

__all__ = ["HealthFactor", "TieredMargin", "from_config", "kinds", "load"]


def kinds() -> tuple[str, ...]:
    """Names of the rules this package offers: the modules of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def _rule(kind: str) -> type:
    module = importlib.import_module(f"{__name__}.{kind}")
    name = "".join(part.capitalize() for part in kind.split("_"))
    return getattr(module, name)


def from_config(config: Mapping[str, Any], *, name: str = "venue", today: str | None = None) -> Any:
    """Venue from the plain mapping of its YAML; `kind` names the rule.

    Args:
      config: `kind`, the rule's parameters, `source` and `as_of` (a date, 2026-09-30, 2026-09 or 2026).
      name: for messages and reports.
      today: date that `as_of` must not lie behind; the present one when left out.

    Raises:
      InputError: unknown kind or key, a table from the future, or a value the rule refuses.
    """
    values = dict(config)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds():
        raise InputError(f"venue.{name}.kind is {kind!r}: {did_you_mean(str(kind), kinds())}")
    rule = _rule(kind)
    known = [f.name for f in fields(rule) if f.init and f.name not in ("name", "funding_rate")]
    if "funding_interval_hours" in known:
        known.append("funding")
    for key in values:
        if key not in known:
            raise InputError(f"venue.{name}.{key} is not an option: {did_you_mean(str(key), known)}")
    _check_date(values, name, today)
    funding = values.pop("funding", None)
    if funding is not None:
        values |= _funding(funding, name)
    needed = [f.name for f in fields(rule) if f.init and f.default is MISSING and f.default_factory is MISSING]
    for key in needed:
        if values.get(key) is None:
            raise InputError(f"venue.{name}.{key} is missing: give it a value")
    try:
        return rule(**values, name=name)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"venue.{name} has a value of a wrong type ({text}); compare the shipped venues.") from None


def _check_date(values: Mapping[str, Any], name: str, today: str | None) -> None:
    for key in ("source", "as_of"):
        if not str(values.get(key) or ""):
            raise InputError(f"venue.{name}.{key} is missing: say where the numbers come from and when they held")
    given = str(values["as_of"])
    if not re.fullmatch(r"\d{4}(-\d{2}(-\d{2})?)?", given):
        raise InputError(f"venue.{name}.as_of is {given!r}; it must be a date such as 2026-09-30, 2026-09 or 2026")
    now = today or datetime.date.today().isoformat()
    if given > now[: len(given)]:
        raise InputError(f"venue.{name}.as_of is {given}, after today ({now}): a table from the future; mend the date")


def _funding(funding: Mapping[str, Any], name: str) -> dict[str, float]:
    place = f"venue.{name}.funding"
    for key in funding:
        if key not in ("rate_per_8h", "interval_hours"):
            raise InputError(
                f"{place}.{key} is not an option: {did_you_mean(str(key), ('rate_per_8h', 'interval_hours'))}"
            )
    if "rate_per_8h" not in funding:
        raise InputError(f"{place}.rate_per_8h is missing: give the rate that longs pay per 8 hours")
    rate, hours = float(funding["rate_per_8h"]), float(funding.get("interval_hours", 8.0))
    if not -0.1 <= rate <= 0.1:
        raise InputError(f"{place}.rate_per_8h={rate:g} must lie in [-0.1, 0.1]: 0.0001 is 0.01 %")
    if not hours > 0.0:
        raise InputError(f"{place}.interval_hours={hours:g} must be above 0")
    return {"funding_rate": rate * hours / 8.0, "funding_interval_hours": hours}


def folder() -> Path:
    """Folder of the venue YAMLs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf" / "venue"
    return inside if inside.is_dir() else package.parent / "conf" / "venue"


def load(name: str | Path) -> Any:
    """Venue by the name of a shipped YAML ("binance", "aave_v3") or by the path of one's own.

    Raises:
      InputError: no such venue, or a value its rule refuses.
    """
    import yaml

    path = Path(name) if str(name).endswith((".yaml", ".yml")) else folder() / f"{name}.yaml"
    if not path.is_file():
        available = sorted(p.stem for p in folder().glob("*.yaml"))
        raise InputError(
            f"there is no venue {str(name)!r}; available are {', '.join(available)}, or give the path of a YAML file."
        )
    return from_config(yaml.safe_load(path.read_text()), name=path.stem)
