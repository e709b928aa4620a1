"""GPM: on inputs like the teacher's a module does what the teacher's does, however long it is trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ipvla.forgetting.method import MethodConfig
from ipvla.forgetting.moment_methods import GPM, GPMConfig, input_space
from ipvla.training.protection import Protection

OUT, RANK, IN = 5, 2, 8


def moment(*spectrum: float) -> Tensor:
    """[IN, IN] with these eigenvalues, the others 0, in random directions."""
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[
        0
    ]
    values = torch.tensor([*spectrum, *[0.0] * (IN - len(spectrum))], dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T


def made() -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(RANK, IN)), nn.Parameter(torch.zeros(OUT, RANK))


def gpm(pair: tuple[nn.Parameter, nn.Parameter], energy: float = 0.95) -> GPM:
    return GPMConfig(energy).build({"m": pair}, {"m": moment(6, 3, 1)})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_what_the_teacher_saw_is_answered_as_before_and_the_rest_is_learned(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    a, b = made()
    surgery, space = gpm((a, b)), input_space(moment(6, 3, 1), 0.95)
    steps = optimizer([a, b], lr=0.1, weight_decay=0.1)
    torch.manual_seed(1)
    x, y = torch.randn(64, IN), torch.randn(64, OUT)
    for _ in range(30):
        steps.zero_grad()
        (x @ a.T @ b.T - y).square().mean().backward()
        with Protection(MethodConfig(), surgery).around():
            steps.step()
    seen = torch.randn(16, space.shape[1]) @ space.T.float()
    assert (x @ a.T @ b.T).abs().max() > 0.05
    assert (seen @ a.T @ b.T).abs().max() < 1e-6


def test_installation_projects_a_and_changes_no_output() -> None:
    a, b = made()
    before = a.detach().clone()
    gpm((a, b))
    space = input_space(moment(6, 3, 1), 0.95).float()
    torch.testing.assert_close(a.detach(), before - before @ space @ space.T)
    assert not b.detach().any()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=IN), st.floats(0.01, 1))
def test_the_space_holds_the_energy_and_no_smaller_one_does(spectrum: list[float], energy: float) -> None:
    second = moment(*spectrum)
    space = input_space(second, energy)
    held = torch.einsum("ik,ij,jk->k", space, second, space)
    total = second.trace()
    assert held.sum() >= energy * total * (1 - 1e-9)
    assert held[:-1].sum() < energy * total
    torch.testing.assert_close(space.T @ space, torch.eye(space.shape[1], dtype=torch.float64))


def test_all_energy_is_all_that_the_inputs_span() -> None:
    assert input_space(moment(6, 3, 1), 1.0).shape == (IN, 3)
    assert gpm(made(), energy=1.0).protected_share == 3 / IN


def test_what_does_not_fit_is_refused() -> None:
    for energy in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"it must be above 0 and at most 1"):
            GPMConfig(energy)
    a, b = made()
    with pytest.raises(ValueError, match=r"no input space for \['m'\]"):
        GPMConfig().build({"m": (a, b)}, {})
    with pytest.raises(ValueError, match="is of width 3, its adapter of 8"):
        GPMConfig().build({"m": (a, b)}, {"m": torch.eye(3)})
    with pytest.raises(ValueError, match="take all 8 dimensions, nothing is left to learn in"):
        GPMConfig(1.0).build({"m": (a, b)}, {"m": torch.eye(IN)})
    with pytest.raises(ValueError, match="B of m is not 0"):
        gpm((a, nn.Parameter(torch.ones(OUT, RANK))))
