"""One set of gains turns every method: which it takes, which it refuses, and what is logged of it."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ipvla.forgetting import Gains, HSWConfig, MethodConfig

METHODS = dict(MethodConfig.get_known_choices())


@pytest.mark.parametrize("name", [name for name, config in METHODS.items() if config.gained])
def test_a_methods_gains_are_its_own_fields_and_idle_by_default(name: str) -> None:
    config = METHODS[name]
    assert config().gains == Gains()
    assert set(config.gained) == {f.name for f in fields(Gains)} & {f.name for f in fields(config)}
    values = dict(zip(config.gained, (0.25, 0.75), strict=False))
    assert config(**values).gains == Gains(**values)
    for gain in config.gained:
        with pytest.raises(ValueError, match=f"{gain} is -1; it must be"):
            config(**{gain: -1})


def test_only_gradients_bear_gains_above_1() -> None:
    larger = [name for name, config in METHODS.items() if config.largest_gain > 1]
    assert larger == ["hsw"]
    assert HSWConfig(beta=1.5).gains == Gains(beta=1.5)
    with pytest.raises(ValueError, match=r"beta is 1\.5; it must be in \[0, 1\]"):
        Gains(beta=1.5).check()


def test_gains_are_logged_under_their_written_names() -> None:
    gains = Gains(0.1, 0.2, 3.0, 0.4)
    assert gains.metrics(("beta", "lam")) == {"gain/beta": 0.1, "gain/lambda": 3.0}
    assert gains.metrics(()) == {}


@pytest.mark.parametrize(
    "wrong", [{"lam": float("inf")}, {"lam": float("nan")}, {"kappa": 1.0}, {"gamma": float("nan")}]
)
def test_what_is_no_gain_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        Gains(**wrong).check()
