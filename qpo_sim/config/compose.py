"""Where `conf/` is, how Hydra composes it, and what its errors mean."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpo_sim.config.build import build, is_in_schema
from qpo_sim.config.check import check
from qpo_sim.config.schema import Config
from qpo_sim.errors import InputError, did_you_mean, nearest

PACKAGE = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """Folder of the shipped configuration: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def user_cache_folder() -> Path:
    """The user's cache folder for qpo_sim, by the custom of the operating system; it need not exist yet."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qpo_sim"


def hydra_main_options() -> dict[str, Any]:
    """What `hydra.main` must be told besides the folder: 1.4 knows no version_base, 1.3 no execution_whitelist."""
    if _hydra_version() < (1, 4):
        return {"version_base": "1.3"}
    return {"execution_whitelist": ("qpo_sim.*", "hydra.*", "hydra_plugins.*")}


def _hydra_version() -> tuple[int, ...]:
    from importlib.metadata import version

    return tuple(int(part) for part in version("hydra-core").split(".")[:2])


def offer_venues(config_dir: str | Path | None = None) -> None:
    """Tells Hydra of every `venue/*.yaml`, ours and the user's, as the group option `venue=all`.

    So a venue is added by adding its file, and each is composed under `venue.<file name>`.

    Args:
      config_dir: the user's own configuration folder.
    """
    from hydra.core.config_store import ConfigStore

    folders = [conf_folder(), *([Path(config_dir)] if config_dir else [])]
    names = sorted({file.stem for folder in folders for file in (folder / "venue").glob("*.yaml")})
    node = {"defaults": [f"{name}@{name}" for name in names]}
    again: dict[str, Any] = {} if _hydra_version() < (1, 4) else {"replace": True}
    ConfigStore.instance().store(group="venue", name="all", node=node, **again)


def to_config(composed: Any) -> Config:
    """Typed, checked options from what Hydra composed.

    Args:
      composed: a DictConfig, with or without Hydra's own section, or plain nested mappings.

    Raises:
      InputError: naming the option, its value and the rule.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

    if isinstance(composed, DictConfig):
        # Hydra's own section is not ours to resolve: parts of it exist only inside a job.
        ours = [str(name) for name in composed if name != "hydra"]
        try:
            plain = OmegaConf.to_container(OmegaConf.masked_copy(composed, ours), resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise InputError(f"{error.full_key} is missing: give it a value") from error
        except (OmegaConfBaseException, InterpolationResolutionError) as error:
            raise InputError(f"{error.full_key or 'the configuration'} cannot be read: {_first_line(error)}") from error
    else:
        plain = composed
    if isinstance(plain, Mapping):
        stray = [name for name in plain if name not in Config.__dataclass_fields__]
        if stray:
            name = str(stray[0])
            shown = name if name.isprintable() else repr(name)
            raise InputError(f"{shown} is not an option: {suggest_option(name, plain)}")
    config = build(Config, plain)
    check(config)
    return config


def load(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "config") -> Config:
    """Options as the command line would compose them, for use from Python.

    Args:
      overrides: as on the command line, e.g. ["market=gbm", "simulation.n_paths=4096"].
      config_dir: folder with the user's own configuration files.
      config_name: name of the root file.

    Raises:
      InputError: naming the option, its value and the rule.
    """
    return to_config(compose(overrides, config_dir=config_dir, config_name=config_name))


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "config") -> Any:
    """What Hydra composes, unchecked; see `load`."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    offer_venues(config_dir)
    folders = [conf_folder(), *([Path(config_dir).resolve()] if config_dir else [])]
    # Hydra looks for the root file in its main folder alone.
    folders.sort(key=lambda folder: not (folder / f"{config_name}.yaml").is_file())
    searchpath = [f"hydra.searchpath=[file://{folder}]" for folder in folders[1:]]
    options = {"version_base": "1.3"} if _hydra_version() < (1, 4) else {}
    active = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folders[0]), **options):
            return hydra.compose(config_name, overrides=[*searchpath, *overrides])
    except (HydraException, ValueError) as error:
        raise InputError(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = active


def explain(error: BaseException) -> str:
    """One sentence for a person from an error of Hydra's composition."""
    text = str(error)
    if match := re.search(r"Could not override '([^'@]+)(?:@[^']*)?'\. ?No match in the defaults list", text):
        return f"{match[1]} is not chosen by default: write +{match[1]}=... to add it"
    if match := re.search(r"Multiple values for ([^\s.]+)", text):
        return f"{match[1]} is chosen twice: write {match[1]}=... once, without a +"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        if is_in_schema(Config, key):
            return f"{key} is not there to override: write +{key}=... to add it"
        if "not in struct" in f"{text} {error.__cause__}":
            return f"{key} is not an option: {suggest_option(key, _defaults())}"
        return f"{key} cannot be set: {_first_line(error.__cause__ or error)}"
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{match[1]} is there already: write {match[1]}=... without the +"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        options = [name for name in re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE) if name != "all"]
        what = f"{group}={option}" if group else option
        return f"{what} is not there to choose: {did_you_mean(option, options)}"
    if match := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        return f"{match[1]} cannot be taken out, it is not an option: {suggest_option(match[1], _defaults())}"
    if "Cannot find primary config" in text:
        name = _quoted(text)
        return f"configuration {name} is not found: name the folder of your files with --config-dir, not --config-path"
    if type(error).__name__ == "OverrideParseException":
        return f"{error.override!r} cannot be read: write option=value, in quotes where the shell would change it"  # type: ignore[attr-defined]
    return " ".join(text.split())


def suggest_option(key: str, composed: Any) -> str:
    """Words that help with a misspelt option: the same last part elsewhere, or the nearest name."""
    known = [name for name in _dotted(composed) if name != key]
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last and _depth(name) <= 2]
    if same:
        return f"did you mean {' or '.join(map(repr, same[:3]))}?"
    # A word of the same section first; then anything, by its full name or by its last part.
    section = key.rpartition(".")[0]
    by_last = {name.rpartition(".")[2]: name for name in reversed(known) if _depth(name) <= 2}
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    for names, word in ((siblings, last), ({name: name for name in known}, key), (by_last, last)):
        near = nearest(word, names)
        if near is not None:
            return f"did you mean {names[near]!r}?"
    return "see all of them with --cfg job"


def _depth(name: str) -> int:
    return name.count(".") + 1


def _dotted(node: Any, prefix: str = "") -> list[str]:
    names = []
    for name, value in node.items() if isinstance(node, Mapping) else ():
        names.append(f"{prefix}{name}")
        names += _dotted(value, f"{prefix}{name}.")
    return names


def _defaults() -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose(), resolve=False)


def _quoted(text: str) -> str:
    match = re.search(r"'[^']*'", text)
    return match[0] if match else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
