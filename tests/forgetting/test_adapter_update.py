"""What is left of an optimizer's update of LoRA factors, under each surgery."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ipvla.forgetting import (
    Gains,
    InputDecayConfig,
    Method,
    MethodConfig,
    ProjectedUpdateConfig,
    RoutedMomentsConfig,
    TwoSidedConfig,
)
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import TinyConfig
from ipvla.training.protection import Protection
from tests.forgetting.made_up import WIDTH, subspace, subspaces
from tests.models.conftest import inputs_for

IN, RANK = 7, 3
NAMES = ("4.o_proj", "4.down_proj")
SUBSPACES = {name: subspace(i) for i, name in enumerate(NAMES)}
gain = st.floats(0, 1)

Factors = dict[str, tuple[nn.Parameter, nn.Parameter]]
Optimize = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam_one_by_one(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.01, foreach=False)


def moment(n: int, rank: int, seed: int) -> Tensor:
    """[n, n] of that rank, its trace n."""
    x = torch.randn(rank, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    second = x.T @ x
    return second * n / second.trace()


STATISTICS = {name: (moment(IN, 20, i), moment(WIDTH, 5, i + 9)) for i, name in enumerate(NAMES)}
MOMENTS = {name: of_inputs for name, (of_inputs, _) in STATISTICS.items()}


def made(dtype: torch.dtype = torch.float32) -> Factors:
    random = torch.Generator().manual_seed(0)
    return {
        name: (
            nn.Parameter(torch.randn(RANK, IN, generator=random).to(dtype)),
            nn.Parameter(torch.randn(WIDTH, RANK, generator=random).to(dtype)),
        )
        for name in NAMES
    }


def flat(factors: Factors) -> list[nn.Parameter]:
    return [p for pair in factors.values() for p in pair]


def give_gradients(factors: Factors, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for p in flat(factors):
        p.grad = torch.randn(p.shape, generator=random).to(p.dtype) * 10 ** (step % 3 - 1)


def around(method: Method) -> AbstractContextManager[None]:
    return Protection(MethodConfig(), method).around()


def walk(
    factors: Factors, optimizer: torch.optim.Optimizer, surgery: Method | None, steps: range = range(4)
) -> None:
    for step in steps:
        give_gradients(factors, step)
        if surgery is None:
            optimizer.step()
        else:
            with around(surgery):
                optimizer.step()


def build(kind: str, factors: Factors, optimizer: torch.optim.Optimizer, off: bool = False) -> Method:
    gains = {} if off else {"beta": 0.8, "gamma": 0.3}
    if kind == "projected":
        return ProjectedUpdateConfig(**gains).build(factors, SUBSPACES)
    if kind == "routed":
        return RoutedMomentsConfig(**gains).build(factors, SUBSPACES, optimizer)
    if kind == "input decay":
        return (InputDecayConfig() if off else InputDecayConfig(lam=3)).build(factors, MOMENTS)
    return (TwoSidedConfig() if off else TwoSidedConfig(lam=3, kappa=0.01)).build(factors, STATISTICS)


@pytest.mark.parametrize("kind", ["projected", "routed", "two-sided", "input decay"])
class TestEverySurgery:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_off_leaves_every_bit_of_the_optimizers_work(self, kind: str, dtype: torch.dtype) -> None:
        plain, cut = made(dtype), made(dtype)
        walk(plain, adamw(flat(plain)), None)
        optimizer = adamw(flat(cut))
        walk(cut, optimizer, build(kind, cut, optimizer, off=True))
        assert all(torch.equal(p, q) for p, q in zip(flat(plain), flat(cut), strict=True))

    def test_on_it_changes_what_is_learned(self, kind: str) -> None:
        plain, cut = made(), made()
        walk(plain, adamw(flat(plain)), None)
        optimizer = adamw(flat(cut))
        walk(cut, optimizer, build(kind, cut, optimizer))
        learned = 0 if kind == "input decay" else 1
        assert all(not torch.allclose(plain[name][learned], cut[name][learned], atol=1e-4) for name in NAMES)

    def test_it_goes_on_from_a_checkpoint(self, kind: str) -> None:
        whole, half = made(), made()
        optimizer = adamw(flat(whole))
        walk(whole, optimizer, build(kind, whole, optimizer), range(6))

        optimizer = adamw(flat(half))
        walk(half, optimizer, build(kind, half, optimizer), range(3))
        saved, state = [p.detach().clone() for p in flat(half)], optimizer.state_dict()
        resumed = made()
        optimizer = adamw(flat(resumed))
        surgery = build(kind, resumed, optimizer)
        optimizer.load_state_dict(state)
        for p, value in zip(flat(resumed), saved, strict=True):
            p.data = value
        walk(resumed, optimizer, surgery, range(3, 6))
        assert all(torch.equal(p, q) for p, q in zip(flat(whole), flat(resumed), strict=True))

    def test_a_step_that_fails_is_not_corrected(self, kind: str) -> None:
        factors = made()
        optimizer = adamw(flat(factors))
        surgery = build(kind, factors, optimizer)
        walk(factors, optimizer, surgery)
        before = [p.detach().clone() for p in flat(factors)]
        with pytest.raises(FloatingPointError), around(surgery):
            raise FloatingPointError
        assert all(torch.equal(p, q) for p, q in zip(flat(factors), before, strict=True))

    def test_it_trains_peft_adapters(self, kind: str) -> None:
        torch.manual_seed(0)
        backbone = TinyConfig(width=WIDTH, heads=2, mlp=16, trunk_channels=4).build(5, 1, 28)
        LoRAConfig(rank=2, last_layers=4, modules=("o_proj", "down_proj")).apply(backbone)
        layers, by_layer = backbone.language_layers(), subspaces()
        adapted = {f"{n}.{m}": layers[n].get_submodule(m) for n in (2, 3, 4, 5) for m in ("o_proj", "down_proj")}
        factors = {k: (m.lora_A.default.weight, m.lora_B.default.weight) for k, m in adapted.items()}
        optimizer = adamw(flat(factors))
        chosen = {name: by_layer.for_layer(int(name[0])) for name in factors}
        statistics = {k: (moment(a.shape[1], 4, 0), moment(WIDTH, 4, 1)) for k, (a, b) in factors.items()}
        surgery = {
            "projected": lambda: ProjectedUpdateConfig(gamma=0).build(factors, chosen),
            "routed": lambda: RoutedMomentsConfig(gamma=0).build(factors, chosen, optimizer),
            "two-sided": lambda: TwoSidedConfig(lam=5).build(factors, statistics),
            "input decay": lambda: InputDecayConfig(lam=0.1).build(
                factors, {k: m for k, (m, _) in statistics.items()}
            ),
        }[kind]()

        def loss() -> Tensor:
            return (backbone(inputs).features.cognition - 1).square().mean()

        inputs = inputs_for(backbone, ["put the red cube in the bowl", "open it"])
        before = loss().detach()
        for _ in range(8):
            optimizer.zero_grad()
            loss().backward()
            with around(surgery):
                optimizer.step()
        assert loss() < before
        if kind == "projected":
            for name, (_, b) in factors.items():
                assert (chosen[name].fragile.T @ b).norm() < 1e-5 * b.norm()


def difference(after: Factors, before: Factors, name: str, factor: int = 1) -> Tensor:
    return (after[name][factor] - before[name][factor]).detach()


class TestProjectedUpdate:
    @given(beta=gain, gamma=gain)
    @settings(max_examples=20, deadline=None)
    def test_each_part_of_the_update_is_scaled_by_its_gain(self, beta: float, gamma: float) -> None:
        start, plain, cut = made(), made(), made()
        walk(plain, adamw(flat(plain)), None, range(1))
        surgery = ProjectedUpdateConfig(beta, gamma).build(cut, SUBSPACES)
        walk(cut, adamw(flat(cut)), surgery, range(1))
        for name, one in SUBSPACES.items():
            gains = torch.diag(torch.tensor([gamma] * 3 + [beta] * 2))
            kept = torch.eye(WIDTH) - one.basis @ (torch.eye(5) - gains) @ one.basis.T
            expected = kept @ difference(plain, start, name)
            torch.testing.assert_close(difference(cut, start, name), expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(plain[name][0], cut[name][0]), "A is left alone"

    @pytest.mark.parametrize("optimize", [adamw, adam_one_by_one, sgd])
    def test_gamma_0_writes_nothing_fragile_under_any_optimizer(self, optimize: Optimize) -> None:
        factors = made()
        for _, b in factors.values():
            nn.init.zeros_(b)
        walk(factors, optimize(flat(factors)), ProjectedUpdateConfig(gamma=0).build(factors, SUBSPACES), range(20))
        for name, (a, b) in factors.items():
            written = b @ a
            assert (SUBSPACES[name].fragile.T @ written).norm() < 1e-5 * written.norm()

    def test_gains_are_set_in_place(self) -> None:
        changed, fresh = made(), made()
        surgery = ProjectedUpdateConfig().build(changed, SUBSPACES)
        surgery.set_gains(Gains(beta=0.5, gamma=0.1))
        walk(changed, adamw(flat(changed)), surgery)
        walk(fresh, adamw(flat(fresh)), ProjectedUpdateConfig(0.5, 0.1).build(fresh, SUBSPACES))
        assert all(torch.equal(p, q) for p, q in zip(flat(changed), flat(fresh), strict=True))


class TestRoutedMoments:
    def test_it_is_adamw_with_one_first_moment_per_part_and_one_second(self) -> None:
        """Written out with its own moments, as in the paper; the gains change on the way."""
        factors, lr, decay, (m_keep, v_keep), eps = made(), 0.02, 0.1, (0.8, 0.95), 1e-6
        optimizer = torch.optim.AdamW(flat(factors), lr, (m_keep, v_keep), eps, weight_decay=decay, fused=True)
        surgery = RoutedMomentsConfig().build(factors, SUBSPACES, optimizer)
        expected = {name: b.detach().double() for name, (_, b) in factors.items()}
        moments = {name: [torch.zeros(WIDTH, RANK, dtype=torch.float64)] * 4 for name in factors}
        for step, (beta, gamma) in enumerate([(1, 1), (0.9, 0.4), (0.9, 0), (0.6, 0.2), (1, 1), (0, 0.5)], 1):
            surgery.set_gains(Gains(beta, gamma))
            walk(factors, optimizer, surgery, range(step, step + 1))
            for name, one in SUBSPACES.items():
                g, uf, up = factors[name][1].grad.double(), one.fragile.double(), one.plastic.double()
                parts = [uf @ (uf.T @ g), up @ (up.T @ g)]
                parts.append(g - sum(parts))
                m = [m_keep * old + (1 - m_keep) * new for old, new in zip(moments[name], parts, strict=False)]
                v = v_keep * moments[name][3] + (1 - v_keep) * g**2
                moments[name] = [*m, v]
                root = (v / (1 - v_keep**step)).sqrt() + eps
                update = (gamma * m[0] + beta * m[1] + m[2]) / (1 - m_keep**step) / root
                expected[name] = expected[name] * (1 - lr * decay) - lr * update
        for name, (_, b) in factors.items():
            torch.testing.assert_close(b.detach().double(), expected[name], rtol=1e-4, atol=1e-5)

    def test_adam_divides_out_a_cut_of_the_gradient_but_not_of_its_first_moment(self) -> None:
        one = subspace(fragile=WIDTH, plastic=0)  # everything is fragile

        def length(routed: bool, gamma: float) -> float:
            b = nn.Parameter(torch.zeros(WIDTH, RANK))
            factors = {"x": (nn.Parameter(torch.zeros(RANK, IN)), b)}
            optimizer = torch.optim.AdamW([b], lr=0.01)
            surgery = RoutedMomentsConfig(gamma=gamma if routed else 1).build(factors, {"x": one}, optimizer)
            for step in range(10):
                g = torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(step)) + 1
                b.grad = g * (1 if routed else gamma)
                with around(surgery):
                    optimizer.step()
            return float(b.detach().norm())

        assert length(False, 0.1) == pytest.approx(length(False, 1), rel=1e-3)
        assert length(True, 0.1) == pytest.approx(0.1 * length(True, 1), rel=1e-3)

    def test_the_optimizers_own_state_is_that_of_plain_adamw(self) -> None:
        plain, cut = made(), made()
        by_itself, routed = adamw(flat(plain)), adamw(flat(cut))
        walk(plain, by_itself, None)
        walk(cut, routed, RoutedMomentsConfig(gamma=0).build(cut, SUBSPACES, routed))
        for p, q in zip(flat(plain), flat(cut), strict=True):
            assert all(torch.equal(by_itself.state[p][k], routed.state[q][k]) for k in by_itself.state[p])

    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_without_a_step_nothing_is_corrected(self, steps_before: int) -> None:
        factors = made()
        optimizer = adamw(flat(factors))
        surgery = RoutedMomentsConfig(gamma=0).build(factors, SUBSPACES, optimizer)
        walk(factors, optimizer, surgery, range(steps_before))
        before = [p.detach().clone() for p in flat(factors)]
        optimizer.zero_grad()
        with around(surgery):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(flat(factors), before, strict=True))

    def test_only_plain_adamw_over_these_factors_will_do(self) -> None:
        factors, config = made(), RoutedMomentsConfig()
        with pytest.raises(ValueError, match="the optimizer is SGD"):
            config.build(factors, SUBSPACES, sgd(flat(factors)))
        with pytest.raises(ValueError, match="set amsgrad and maximize to False"):
            config.build(factors, SUBSPACES, torch.optim.AdamW(flat(factors), amsgrad=True))
        with pytest.raises(ValueError, match=r"does not train B of \['4.down_proj'\]"):
            config.build(factors, SUBSPACES, adamw(flat(factors)[:3]))


class TestTwoSided:
    @given(lam=st.floats(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_the_update_is_solved_against_both_moments(self, lam: float) -> None:
        start, plain, cut = made(), made(), made()
        walk(plain, sgd(flat(plain)), None, range(1))
        surgery = TwoSidedConfig(lam=5).build(cut, STATISTICS)
        surgery.set_gains(Gains(lam=lam))
        walk(cut, sgd(flat(cut)), surgery, range(1))
        for name, (of_inputs, of_gradients) in STATISTICS.items():
            for factor, second in enumerate((of_inputs, of_gradients)):
                update, damped = (difference(f, start, name, factor).double() for f in (plain, cut))
                if factor == 0:
                    update, damped = update.T, damped.T
                root = torch.linalg.cholesky(torch.eye(len(second)) + lam * second)
                expected = torch.cholesky_solve(update, root)
                torch.testing.assert_close(damped, expected, rtol=1e-4, atol=2e-6)

    def test_a_direction_that_the_teacher_never_uses_is_free(self) -> None:
        second = torch.diag(torch.tensor([2.0] * 6 + [0.0] * 6))
        start, plain, cut = made(), made(), made()
        walk(plain, adamw(flat(plain)), None, range(1))
        surgery = TwoSidedConfig(lam=1e6).build(cut, {name: (moment(IN, 20, 0), second) for name in NAMES})
        walk(cut, adamw(flat(cut)), surgery, range(1))
        for name in NAMES:
            full, damped = difference(plain, start, name), difference(cut, start, name)
            torch.testing.assert_close(damped[6:], full[6:])
            assert damped[:6].norm() < 1e-4 * full[:6].norm()

    def test_b_decays_by_kappa_at_every_step_and_a_does_not(self) -> None:
        factors = made()
        surgery = TwoSidedConfig(kappa=0.1).build(factors, STATISTICS)
        for _ in range(3):
            with around(surgery):
                pass
        for (a, b), (a0, b0) in zip(factors.values(), made().values(), strict=True):
            torch.testing.assert_close(b, b0 * 0.9**3)
            assert torch.equal(a, a0)

    @pytest.mark.parametrize(
        ("which", "bad", "message"),
        [
            (0, torch.eye(WIDTH), r"A of 4.o_proj is \[12, 12\], the adapter needs \[7, 7\]"),
            (1, torch.eye(WIDTH) * float("nan"), "G of 4.o_proj is not a finite symmetric matrix"),
            (1, torch.randn(WIDTH, WIDTH), "G of 4.o_proj is not a finite symmetric matrix"),
            (1, torch.diag(torch.tensor([-1.0] + [1.0] * 11)), "G of 4.o_proj has the eigenvalue -1;"),
        ],
    )
    def test_statistics_that_are_no_second_moments_are_refused(
        self, which: int, bad: Tensor, message: str
    ) -> None:
        given = list(STATISTICS["4.o_proj"])
        given[which] = bad
        with pytest.raises(ValueError, match=message):
            TwoSidedConfig().build(made(), {**STATISTICS, "4.o_proj": tuple(given)})


class TestInputDecay:
    @given(lam=st.floats(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_it_minimises_what_old_inputs_see_against_how_far_it_moves(self, lam: float) -> None:
        factors, start = made(), made()
        surgery = InputDecayConfig(lam=5).build(factors, MOMENTS)
        surgery.set_gains(Gains(lam=lam))
        surgery.after()
        for name, second in MOMENTS.items():
            a = factors[name][0].detach().double().requires_grad_()
            seen = lam / 2 * torch.einsum("ri,ij,rj->", a, second.double(), a)
            moved = (a - start[name][0].double()).square().sum() / 2
            (slope,) = torch.autograd.grad(seen + moved, a)
            assert slope.abs().max() <= 1e-5 * (1 + lam)

    def test_what_old_inputs_see_fades_and_what_they_have_nothing_of_stays(self) -> None:
        width = STATISTICS["4.o_proj"][0].shape[0]
        used = torch.diag(torch.tensor([2.0] * 3 + [0.0] * (width - 3)))
        factors, start = made(), made()
        surgery = InputDecayConfig(lam=0.5).build(factors, dict.fromkeys(NAMES, used))
        for _ in range(4):
            surgery.after()
        for name in NAMES:
            (a, b), (a0, b0) = factors[name], start[name]
            torch.testing.assert_close(a[:, :3], a0[:, :3] / 2**4)
            torch.testing.assert_close(a[:, 3:], a0[:, 3:])
            assert torch.equal(b, b0)

    def test_moments_of_another_model_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"M of 4.o_proj is \[12, 12\], the adapter needs \[7, 7\]"):
            InputDecayConfig().build(made(), {**MOMENTS, "4.o_proj": torch.eye(WIDTH)})


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (InputDecayConfig, {"lam": -1}, "lam is -1; it must be finite and at least 0"),
        (ProjectedUpdateConfig, {"beta": 1.1}, r"beta is 1\.1; it must be in \[0, 1\]"),
        (ProjectedUpdateConfig, {"gamma": -1}, "gamma is -1"),
        (RoutedMomentsConfig, {"gamma": 2}, "gamma is 2"),
        (TwoSidedConfig, {"lam": -1}, "lam is -1; it must be finite and at least 0"),
        (TwoSidedConfig, {"lam": float("inf")}, "lam is inf"),
        (TwoSidedConfig, {"kappa": 1}, r"kappa is 1; it must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(config: type, given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)


def test_every_adapter_needs_its_geometry() -> None:
    factors = made()
    with pytest.raises(ValueError, match=r"no subspace for \['4.down_proj'\]"):
        ProjectedUpdateConfig().build(factors, {"4.o_proj": subspace()})
    with pytest.raises(ValueError, match=r"no statistics for \['4.o_proj', '4.down_proj'\]"):
        TwoSidedConfig().build(factors, {})
    with pytest.raises(ValueError, match="there are no LoRA factors"):
        ProjectedUpdateConfig().build({}, SUBSPACES)
    narrow = {name: subspace(width=8) for name in NAMES}
    with pytest.raises(ValueError, match="has 12 rows, its subspace is of width 8"):
        ProjectedUpdateConfig().build(factors, narrow)
