"""The worked example of docs/memory.md does what it says."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import draccus
import pytest
import torch

from ipvla.models.memory import MemoryConfig
from tests.models.memory.episodes import build as build_trained
from tests.models.memory.episodes import changed, equal, features, run

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "mean_memory.py"


@pytest.fixture(scope="module")
def example() -> Any:
    """Its file, as a module."""
    module = ModuleType("ipvla_documentation_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(EXAMPLE.read_text(), str(EXAMPLE), "exec"), module.__dict__)
    return module


def test_it_is_chosen_by_its_type(example: Any) -> None:
    config = draccus.decode(MemoryConfig, {"type": "mean", "horizons": [4.0]})
    assert config == example.MeanMemoryConfig((4.0,))


def test_it_begins_silent_and_then_remembers(example: Any) -> None:
    x = features(2, 6)
    fresh = example.MeanMemoryConfig().build(type("Sizes", (), {"width": 6}))
    torch.nn.init.zeros_(fresh.out.bias)
    assert torch.equal(run(fresh, x)[0].cognition, x.cognition)
    trained = build_trained(example.MeanMemoryConfig())
    assert not torch.allclose(
        run(trained, x)[0].cognition[:, 5], run(trained, changed(x, 0))[0].cognition[:, 5], atol=1e-6
    )


def test_a_window_equals_two_halves(example: Any) -> None:
    module, x = build_trained(example.MeanMemoryConfig()), features(2, 8)
    whole, end = run(module, x)
    _, half = run(module, x.map(lambda v: v[:, :4]))
    rest, again = run(module, x.map(lambda v: v[:, 4:]), half, first_t=16)
    torch.testing.assert_close(whole.cognition[:, 4:], rest.cognition)
    assert equal(end, again)


def test_wrong_settings_are_refused(example: Any) -> None:
    with pytest.raises(ValueError, match=r"memory\.horizons is \(\)"):
        example.MeanMemoryConfig(())
