"""Hidden states: how long they hold from the start."""

import torch

from ipvla.models.memory import GRUMemoryConfig, LSTMMemoryConfig
from tests.models.memory.episodes import BACKBONE


def test_gates_hold_for_2_to_40_steps_from_the_start_as_many_for_few_as_for_many() -> None:
    """Chrono initialisation: a gate of bias log(T - 1) keeps 1 - 1/T of the state per step."""
    gru, lstm = GRUMemoryConfig(hidden=64).build(BACKBONE), LSTMMemoryConfig(hidden=64).build(BACKBONE)
    update = (gru.cell.bias_ih + gru.cell.bias_hh)[64:128]
    entry, forget = (lstm.cell.bias_ih + lstm.cell.bias_hh)[:128].chunk(2)
    for bias in (update, forget):
        held = 1 / (1 - torch.sigmoid(bias))
        assert held.min() >= 2 - 1e-4
        assert held.max() <= 40 + 1e-3
        assert 5 < held.median() < 10, "on a logarithmic scale"
    torch.testing.assert_close(entry, -forget)


def test_the_lstm_remembers_both_its_states() -> None:
    assert {name: tuple(v.shape) for name, v in LSTMMemoryConfig(hidden=7).build(BACKBONE).initial(2).items()} == {
        "hidden": (2, 7),
        "cell": (2, 7),
    }
