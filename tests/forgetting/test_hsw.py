"""What gradient surgery does to a gradient, and where in a model it does it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ipvla.forgetting.hsw import HSW, GradientSurgery, HSWConfig
from ipvla.forgetting.method import Gains
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import TinyConfig
from tests.forgetting.made_up import WIDTH, Stack, subspace, subspaces, tokens
from tests.models.conftest import inputs_for

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
COVERED = {"last4": ["down_proj"], "single": ["down_proj"], "writers": ["o_proj", "down_proj"]}
gain = st.floats(0, 1)
seeds = st.integers(0, 2**32)


def surgery(beta: float, gamma: float) -> GradientSurgery:
    made = GradientSurgery(subspace(), CPU)
    made.set_gains(Gains(beta, gamma))
    return made


def gradients(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """Summed over batches, one backward pass each."""
    model.zero_grad()
    for batch in batches:
        model(batch).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def installed(model: Stack, beta: float, gamma: float, sites: str = "last4") -> HSW:
    return HSWConfig(beta=beta, gamma=gamma, sites=sites).build(model.layers, subspaces())


class TestGradient:
    @given(beta=gain, gamma=gain, seed=seeds)
    @settings(max_examples=30, deadline=None)
    def test_each_part_is_scaled_by_its_gain(self, beta: float, gamma: float, seed: int) -> None:
        one, g = surgery(beta, gamma), tokens(seed)
        cut, basis = one.operate(g), one.basis
        gains = torch.tensor([gamma] * 3 + [beta] * 2)
        torch.testing.assert_close(cut @ basis, g @ basis * gains, rtol=1e-4, atol=1e-5)
        rest = torch.eye(WIDTH) - basis @ basis.T
        torch.testing.assert_close(cut @ rest, g @ rest, rtol=1e-4, atol=1e-5)

    @given(beta=gain, seed=seeds)
    @settings(max_examples=30, deadline=None)
    def test_gamma_0_leaves_nothing_along_what_is_fragile(self, beta: float, seed: int) -> None:
        cut = surgery(beta, 0).operate(tokens(seed))
        assert (cut @ subspace().fragile).abs().max() < 1e-5

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gains_of_1_leave_every_bit(self, dtype: torch.dtype) -> None:
        g = tokens().to(dtype)
        assert torch.equal(surgery(1, 1).operate(g), g)

    @given(beta=gain, gamma=gain, seed=seeds)
    @settings(max_examples=30, deadline=None)
    def test_gains_up_to_1_contract(self, beta: float, gamma: float, seed: int) -> None:
        g, h = tokens(seed), tokens(seed + 1)
        one = surgery(beta, gamma)
        assert (one.operate(g) - one.operate(h)).norm() <= (g - h).norm() * (1 + 1e-6)

    @given(beta=st.floats(0, 2), gamma=st.floats(0, 2), seed=seeds)
    @settings(max_examples=30, deadline=None)
    def test_the_norm_never_grows(self, beta: float, gamma: float, seed: int) -> None:
        g = tokens(seed)
        assert surgery(beta, gamma).operate(g).norm() <= g.norm() * (1 + 1e-6)

    def test_gains_above_1_turn_the_gradient_at_the_same_norm(self) -> None:
        one, g = surgery(1.5, 2), tokens()
        cut = one.operate(g)
        grown = g + (g @ one.basis * torch.tensor([1.0, 1, 1, 0.5, 0.5])) @ one.basis.T
        assert grown.norm() > 1.1 * g.norm()
        torch.testing.assert_close(cut, grown * (g.norm() / grown.norm()))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_gradient_that_is_not_finite_passes_untouched(self, bad: float) -> None:
        g = tokens()
        g[0, 2, 3] = bad
        assert torch.equal(surgery(0.5, 0).operate(g).nan_to_num(7), g.nan_to_num(7))

    def test_a_zero_gradient_stays_zero(self) -> None:
        one = surgery(0.5, 2)
        assert not one.operate(torch.zeros(1, 5, WIDTH)).any()
        assert one.totals.isfinite().all()

    def test_backward_under_autocast_computes_in_float32(self) -> None:
        one, g = surgery(0.7, 0), tokens()
        expected = one.operate(g)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(one.operate(g), expected)

    def test_another_width_is_refused(self) -> None:
        with pytest.raises(ValueError, match="are of width 12, the output to protect of 7"):
            surgery(1, 1)(torch.zeros(1, 7))


@pytest.mark.parametrize("extra", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("sites", ["last4", "single", "writers"])
class TestModel:
    def test_gains_of_1_change_no_gradient(self, sites: str, extra: bool) -> None:
        model, x = Stack(extra), tokens()
        before = gradients(model, x)
        installed(model, 1, 1, sites)
        assert identical(gradients(model, x), before)

    def test_the_forward_pass_is_the_same(self, sites: str, extra: bool) -> None:
        model, x = Stack(extra), tokens()
        before = model(x)
        installed(model, 0.5, 0, sites)
        assert torch.equal(model(x), before)

    def test_the_sites_own_weights_write_nothing_fragile(self, sites: str, extra: bool) -> None:
        model = Stack(extra)
        installed(model, 0.5, 0, sites)
        found, whole = gradients(model, tokens()), gradients(Stack(extra), tokens())
        for number in {"single": (5,)}.get(sites, (2, 3, 4, 5)):
            uf = subspaces().for_layer(number).fragile
            for writer in COVERED[sites]:
                name = f"layers.{number}.{writer}.weight"
                assert (uf.T @ found[name]).norm() < 1e-5 * (uf.T @ whole[name]).norm()

    def test_gradients_accumulate(self, sites: str, extra: bool) -> None:
        model = Stack(extra)
        installed(model, 0.5, 0.2, sites)
        both = gradients(model, tokens(0), tokens(1))
        one, other = gradients(model, tokens(0)), gradients(model, tokens(1))
        assert identical(both, {name: one[name] + other[name] for name in one})

    def test_removed_it_is_as_if_never_installed(self, sites: str, extra: bool) -> None:
        model, x = Stack(extra), tokens()
        before, keys = gradients(model, x), list(model.state_dict())
        hsw = installed(model, 0.5, 0, sites)
        assert list(model.state_dict()) == keys
        assert not identical(gradients(model, x), before)
        hsw.remove()
        assert identical(gradients(model, x), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_no_bit(reentrant: bool) -> None:
    model, x = Stack(), tokens().requires_grad_()
    hsw = installed(model, 0.5, 0.2)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model.layers

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    expected, read = gradients(model, x), hsw.readings()
    assert identical(gradients(Checkpointed(), x), expected)
    assert hsw.readings() == read


def test_under_bf16_autocast_gradients_are_cut_and_gains_of_1_leave_every_bit() -> None:
    def found(beta: float, gamma: float) -> dict[str, Tensor]:
        model = Stack()
        hsw = installed(model, beta, gamma)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = gradients(model, tokens())
        hsw.remove()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert identical(out, gradients(model, tokens())) == (beta == gamma == 1)
        return out

    found(1, 1)
    uf = subspaces().for_layer(5).fragile
    cut = found(1, 0)["layers.5.down_proj.weight"]
    assert (uf.T @ cut).norm() < 0.01 * cut.norm()


def test_layers_above_the_site_see_the_whole_gradient() -> None:
    model, x = Stack(), tokens()
    before = gradients(model, x)
    HSWConfig(gamma=0).build(model.layers, subspaces([(0, 1), (2, 3)]))
    after = gradients(model, x)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if int(name.split(".")[1]) <= 3}


@pytest.mark.parametrize(("sites", "times"), [("last4", 4), ("single", 1), ("writers", 0)])
def test_sites_in_a_row_compound_along_the_residual_stream(sites: str, times: int) -> None:
    model = Stack()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    shared = subspaces([(2, 3, 4, 5)])
    HSWConfig(beta=0.8, gamma=0.5, sites=sites).build(model.layers, shared)
    x, g = tokens().requires_grad_(), tokens(1)
    model(x).backward(g)
    one = shared.for_layer(5)
    torch.testing.assert_close(x.grad @ one.fragile, g @ one.fragile * 0.5**times)
    torch.testing.assert_close(x.grad @ one.plastic, g @ one.plastic * 0.8**times)


@given(steps=st.lists(st.tuples(gain, gain), min_size=1, max_size=3))
@settings(max_examples=10, deadline=None)
def test_set_gains_equals_installing_with_them(steps: list[tuple[float, float]]) -> None:
    model, fresh, x = Stack(), Stack(), tokens()
    hsw = installed(model, 1, 1)
    for beta, gamma in steps:
        hsw.set_gains(Gains(beta, gamma))
        gradients(model, x)
    installed(fresh, *steps[-1])
    assert identical(gradients(model, x), gradients(fresh, x))


def test_it_compiles_once_and_without_a_graph_break() -> None:
    model, twin, x = Stack(), Stack(), tokens()
    hsw, eager = installed(model, 1, 1), installed(twin, 1, 1)
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[..., Tensor]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for gains in (Gains(1, 1), Gains(0.5, 0.2), Gains(1.5, 0)):
        hsw.set_gains(gains)
        eager.set_gains(gains)
        model.zero_grad()
        compiled(x).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        assert identical(found, gradients(twin, x))
    assert hsw.readings() == eager.readings()
    assert graphs == 1


class TestReadings:
    def test_they_are_means_since_the_last(self) -> None:
        model = Stack()
        hsw = installed(model, 0.5, 0, "single")
        norms, seen = [], model.layers[5].register_full_backward_hook(lambda *a: norms.append(a[2][0].norm()))
        gradients(model, tokens(0), tokens(1))
        seen.remove()
        read = hsw.readings()
        assert read["layer5.norm_before"] == read["norm_before"] == pytest.approx(float(sum(norms)) / 2)
        assert 0 < read["norm_after"] < read["norm_before"]
        assert read["nonfinite"] == 0
        assert hsw.readings() == {"layer5.nonfinite": 0, "nonfinite": 0}

    def test_energies_are_shares(self) -> None:
        one = GradientSurgery(subspace(), CPU)
        one.operate(3 * one.basis[:, :3].T)
        one.operate(one.basis[:, [0, 3]].T.sum(0, keepdim=True))
        assert (one.totals / 2)[3:5].tolist() == pytest.approx([0.75, 0.25])

    def test_the_whole_is_the_mean_over_sites(self) -> None:
        model = Stack()
        hsw = installed(model, 0.5, 0.2)
        gradients(model, tokens())
        read = hsw.readings()
        for key in ("norm_before", "norm_after", "fragile_energy", "plastic_energy"):
            assert read[key] == pytest.approx(sum(read[f"layer{n}.{key}"] for n in (2, 3, 4, 5)) / 4)

    def test_gradients_that_are_not_finite_are_counted_and_not_averaged(self) -> None:
        model = Stack()
        hsw = installed(model, 0.5, 0.2, "single")
        gradients(model, tokens())
        expected = hsw.readings()
        gradients(model, tokens(), tokens() * float("nan"))
        assert hsw.readings() == {**expected, "nonfinite": 1, "layer5.nonfinite": 1}


@pytest.mark.parametrize(
    ("sites", "names"),
    [
        ("last4", ["layer2", "layer3", "layer4", "layer5"]),
        ("single", ["layer5"]),
        ("writers", [f"layer{n}.{w}" for n in (2, 3, 4, 5) for w in ("o_proj", "down_proj")]),
    ],
)
def test_it_cuts_the_gradients_of_peft_adapters(sites: str, names: list[str]) -> None:
    torch.manual_seed(0)
    backbone = TinyConfig(width=WIDTH, heads=2, mlp=16, trunk_channels=4).build(5, 1, 28)
    LoRAConfig(rank=2, last_layers=4).apply(backbone)
    inputs = inputs_for(backbone, ["put the red cube in the bowl", "open it"])

    def adapters() -> dict[str, Tensor]:
        backbone.zero_grad()
        backbone(inputs).features.cognition.square()[:, ::2].sum().backward()
        return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.requires_grad}

    before = adapters()
    hsw = HSWConfig(gamma=0, sites=sites).build(backbone.language_layers(), subspaces())
    assert list(hsw.surgeries) == names
    after = adapters()
    uf = subspaces().for_layer(5).fragile
    for writer in COVERED[sites]:
        name = next(name for name in after if f"layers.5.{writer}.lora_B" in name)
        assert (uf.T @ after[name]).norm() < 1e-5 * (uf.T @ before[name]).norm()
    hsw.remove()
    assert identical(adapters(), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": -0.1}, r"beta is -0\.1; it must be in \[0, 2\]"),
        ({"gamma": 2.5}, r"gamma is 2\.5"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"sites": "all"}, r"hsw\.sites is 'all'; choose one of last4, single, writers"),
        ({"sites": "writers", "writers": ()}, r"hsw\.writers is empty"),
        ({"epsilon": -1.0}, r"hsw\.epsilon is -1\.0"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSWConfig(**given)


def test_what_does_not_fit_the_model_is_refused() -> None:
    layers = Stack().layers
    with pytest.raises(ValueError, match="protect layer 7, but the model has 6 language layers"):
        HSWConfig().build(layers, subspaces([(4, 5), (6, 7)]))
    with pytest.raises(ValueError, match=r"\['out'\], which layer 2 does not have"):
        HSWConfig(sites="writers", writers=("o_proj", "out")).build(layers, subspaces())
    with pytest.raises(ValueError, match=r"beta is 3"):
        HSWConfig().build(layers, subspaces()).set_gains(Gains(3, 1))
