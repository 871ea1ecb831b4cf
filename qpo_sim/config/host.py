"""What JAX must be told about this computer before it starts."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

from qpo_sim.errors import InputError


def use_cores(n: int | None = None) -> int:
    """Makes each CPU core a device of JAX, so that a run uses them all; to be called before the first use of JAX.

    A run spreads its paths over JAX's devices, and JAX takes the whole CPU as one unless it is told otherwise. Results
    do not depend on the number of devices. What the environment's XLA_FLAGS says already is kept.

    Args:
      n: how many devices; when omitted, as many as XLA_FLAGS asks for or else the cores this process may use.

    Returns:
      How many CPU devices JAX will have.

    Raises:
      InputError: n is not a whole number of at least 1, or JAX has already started with another number.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InputError(f"use_cores: n is {n!r}; it must be a whole number of at least 1.")

    import jax

    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    count = n or (int(asked[-1]) if asked else _n_cores())
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise InputError(
            f"use_cores: JAX has already started in this process, so it cannot have {count} CPU devices any more; call "
            "use_cores before anything that computes, best right after the imports."
        ) from error
    # Threads inside a device would only get in the way of the other devices.
    wanted = {"xla_cpu_multi_thread_eigen": "false"}
    if _runs_on_cpu(jax.config.values["jax_platforms"]):
        # The random number cipher is one long chain of operations, each waiting for the one before. Two blocks in
        # flight fill the waits: a tenth to a seventh less time. A GPU's compiler would read this option as well.
        wanted["xla_backend_extra_options"] = "-force-vector-interleave=2"
    added = [f"--{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*filter(None, [flags]), *added])
    return count


def _n_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def _runs_on_cpu(platforms: str | None) -> bool:
    """Whether JAX will run on the CPU; asking JAX itself would start it."""
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return find_spec("jax_plugins") is None and find_spec("libtpu") is None
