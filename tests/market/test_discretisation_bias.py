"""The experiment that measures the bias of the stochastic volatility schemes."""

import importlib
import math

import numpy as np
import pytest

from qpo_sim.market.volatility.rough_bergomi import driver_covariance


@pytest.fixture
def bias(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "experiments")
    return importlib.import_module("discretisation_bias")


def test_rough_moments_without_noise_are_powers(bias, monkeypatch):
    monkeypatch.setitem(bias.ROUGH, "eta", 1e-8)
    third, second = (quantity.exact for quantity in bias.rough_quantities())
    xi, hurst, rho = (bias.ROUGH[name] for name in ("xi", "hurst", "rho"))
    kernel = math.sqrt(2.0 * hurst) / ((hurst + 0.5) * (hurst + 1.5))
    assert third == pytest.approx(3.0 * rho * 1e-8 * xi**1.5 * kernel, rel=1e-9)
    assert second == pytest.approx(xi**2, rel=1e-9)


def test_second_rough_moment_is_a_sum_over_a_fine_grid(bias):
    times = (np.arange(800) + 0.5) / 800.0
    covariance = driver_covariance(bias.ROUGH["hurst"], times[:, None], times)
    on_grid = np.mean(bias.ROUGH["xi"] ** 2 * np.exp(bias.ROUGH["eta"] ** 2 * covariance))
    assert bias.rough_quantities()[1].exact == pytest.approx(on_grid, rel=2e-3)


def test_biases_of_the_schemes(bias):
    """Within 4 standard errors of nothing for QE-M, and plainly there for Euler, at 16 steps a year."""
    found = {}
    for case in bias.cases():
        if case.name == "Heston, Fang-Oosterlee" or case.scheme == "hybrid":
            for quantity, value, error in bias.estimates(case, n_steps=16, n_paths=1 << 14, seed=0):
                found[case.scheme, quantity.name] = (value - quantity.exact) / error
    assert abs(found["QE-M", "call"]) < 4.0 < found["Euler", "call"]
    # The variance held over the step: a few percent at this step, with these few paths hardly seen.
    assert abs(found["hybrid", "E[M^3]"]) < 8.0 and abs(found["hybrid", "E[realised variance^2]"]) < 8.0


@pytest.mark.slow
def test_the_script_prints_its_table(bias, capsys):
    assert bias.main(["--paths", "1024", "--steps", "16"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(bias.PARAMETERS) + 2
