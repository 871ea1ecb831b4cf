"""Margin and liquidation rules of venues. A rule is one file here; a venue is one YAML in conf/venue."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qpo_sim.errors import InputError
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


def from_config(config: Mapping[str, Any], *, name: str = "venue") -> Any:
    """Venue from the plain mapping of its YAML; `kind` names the rule.

    Raises:
      InputError: unknown kind or key, or a value the rule refuses.
    """
    values = dict(config)
    kind = values.pop("kind", None)
    if kind not in kinds():
        raise InputError(f"venue {name}: kind is {kind!r}; it must be one of {', '.join(kinds())}.")
    rule = _rule(kind)
    funding = values.pop("funding", None)
    if funding is not None:
        hours = float(funding.get("interval_hours", 8.0))
        if "rate_per_8h" not in funding:
            raise InputError(f"venue {name}: funding.rate_per_8h is missing; give the rate longs pay per 8 hours.")
        values["funding_rate"] = float(funding["rate_per_8h"]) * hours / 8.0
        values["funding_interval_hours"] = hours
    values["name"] = name
    known = {f.name for f in fields(rule) if f.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"venue {name}: unknown key {unknown[0]!r}; kind {kind} knows {', '.join(sorted(known))}.")
    return rule(**values)


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
