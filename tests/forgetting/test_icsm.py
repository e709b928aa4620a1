"""ICSM finds the directions that a teacher's output depends on, and says so when there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ipvla.forgetting.icsm import ICSMConfig
from ipvla.forgetting.probed import ProbedModel, Reading, instruction_mean
from ipvla.forgetting.subspaces import LayerSubspace, Subspaces
from ipvla.models.backbones import TinyConfig
from tests.forgetting.made_up import principal_angles
from tests.forgetting.probed_models import CHOICES, ProbedBackbone, Reader, Transformer, prompts
from tests.models.conftest import inputs_for

META = {"probe_sha256": "c0ffee", "commit": "ff57e1e"}
INJECTION = ICSMConfig(rank=8)
FISHER = ICSMConfig(rank=8, scoring="fisher")
READ = (2, 5)


def planted() -> tuple[Reader, list[tuple[Tensor, Tensor]]]:
    """Records spread along eight axes, less along each further one, of which the head reads two."""
    spread = torch.diag(torch.linspace(2, 1, 8))
    records = torch.cat([spread, -spread]) + 3
    weight = torch.zeros(CHOICES, 8)
    weight[:, list(READ)] = torch.randn(CHOICES, 2, generator=torch.Generator().manual_seed(0))
    hidden = records[:, None].expand(-1, 3, -1)
    mask = torch.tensor([True, True, False]).expand(16, 3)
    return Reader(weight), [(hidden[:9], mask[:9]), (hidden[9:], mask[9:])]


def fit(config: ICSMConfig, model: ProbedModel, batches: Sequence[Any]) -> Subspaces:
    return config.build().fit(model, batches, META)


def same(a: LayerSubspace, b: LayerSubspace) -> bool:
    names = ("fragile", "plastic", "mean", "covariance", "scores")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("scoring", ["injection", "fisher"])
class TestPlanted:
    config = ICSMConfig(rank=8, fragile_share=0.25)

    def test_the_directions_that_the_head_reads_are_the_fragile_ones(self, scoring: str) -> None:
        found = fit(replace(self.config, scoring=scoring), *planted()).layers[1]
        axes = torch.eye(8)
        assert found.fragile.shape == (8, 2)
        assert principal_angles(found.fragile, axes[:, list(READ)]).max() < 1e-6
        assert principal_angles(found.plastic, axes[:, [0, 1, 3, 4, 6, 7]]).max() < 1e-6

    def test_scores_descend_and_those_of_what_nobody_reads_are_0(self, scoring: str) -> None:
        scores = fit(replace(self.config, scoring=scoring), *planted()).layers[1].scores
        assert (scores.diff() <= 0).all()
        assert (scores[:2] > 1e-6).all()
        assert scores[2:].abs().max() < 1e-12

    def test_mean_and_covariance_are_those_of_the_probe(self, scoring: str) -> None:
        model, batches = planted()
        found = fit(replace(self.config, scoring=scoring), model, batches).layers[1]
        vectors = torch.cat([instruction_mean(hidden, mask) for hidden, mask in batches])
        torch.testing.assert_close(found.mean, vectors.mean(0))
        torch.testing.assert_close(found.covariance, vectors.T.cov())

    def test_the_largest_entry_of_each_direction_is_positive(self, scoring: str) -> None:
        basis = fit(replace(self.config, scoring=scoring), *planted()).layers[1].basis
        assert (basis.gather(0, basis.abs().argmax(0)[None]) > 0).all()


def test_an_injection_score_is_the_divergence_when_the_instruction_moves_both_ways() -> None:
    model, batches = planted()
    found = fit(ICSMConfig(rank=8, epsilon=0.3), model, batches).layers[1]
    hidden, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
    size = 0.3 * found.covariance.trace().sqrt()
    for direction, score in zip(found.basis.T, found.scores, strict=True):
        shifted = [model.read((hidden + sign * size.float() * direction, mask)).output for sign in (1, -1)]
        clean = model.read((hidden, mask)).output
        expected = sum(model.divergence(output, clean).mean() for output in shifted) / 2
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


def test_fisher_scores_are_what_injections_tend_to() -> None:
    small = ICSMConfig(rank=8, epsilon=0.01)
    model, batches = planted()
    exact = fit(small, Reader(model.weight.double()), [(h.double(), m) for h, m in batches]).layers[1]
    fisher = fit(replace(small, scoring="fisher", labels=500), model, batches).layers[1]
    torch.testing.assert_close(fisher.scores[:2], exact.scores[:2], rtol=0.1, atol=0)


class TestTransformer:
    def test_columns_are_orthonormal_and_shares_are_as_configured(self) -> None:
        found = fit(replace(FISHER, fragile_share=0.75), Transformer(), prompts())
        for layer in found.layers.values():
            assert (layer.fragile.shape, layer.plastic.shape) == ((16, 6), (16, 2))
            assert layer.fragile.dtype == torch.float32
            torch.testing.assert_close(layer.basis.T @ layer.basis, torch.eye(8))

    def test_the_two_scorings_agree_where_the_second_order_holds(self) -> None:
        found = fit(replace(INJECTION, labels=16), Transformer(), prompts())
        assert found.meta["agreement"].keys() == {str(layer) for layer in found.layers}
        assert min(found.meta["agreement"].values()) > 0.9
        assert fit(FISHER, Transformer(), prompts()).meta["agreement"] == {}, "there is one scoring only"

    def test_the_same_probe_and_seed_give_the_same_bits(self) -> None:
        one, other = (fit(INJECTION, Transformer(), prompts()) for _ in range(2))
        assert one.layers.keys() == other.layers.keys()
        assert all(same(one.layers[n], other.layers[n]) for n in one.layers)
        assert one.projector_sha256() == other.projector_sha256()

    def test_batching_changes_no_subspace(self) -> None:
        one = fit(INJECTION, Transformer(), prompts())
        other = fit(INJECTION, Transformer(), list(torch.cat(prompts()).split(5)))
        for n in one.layers:
            torch.testing.assert_close(other.layers[n].scores, one.layers[n].scores, rtol=1e-3, atol=0)
            assert principal_angles(one.layers[n].fragile, other.layers[n].fragile).max() < 1e-3

    def test_it_leaves_the_teacher_as_it_was(self) -> None:
        model, (batch, *_) = Transformer(), prompts()
        before = model.read(batch).output
        fit(INJECTION, model, prompts())
        assert torch.equal(model.read(batch).output, before)
        assert all(p.grad is None for p in model.parameters())

    def test_records_without_an_instruction_are_counted_and_left_out(self) -> None:
        silent = prompts()[0][:4].clone()
        silent[:, :3] = 0
        whole = fit(FISHER, Transformer(), prompts())
        mixed = fit(FISHER, Transformer(), [*prompts(), silent])
        assert (whole.meta["records"], whole.meta["empty_masks"]) == (48, 0)
        assert (mixed.meta["records"], mixed.meta["empty_masks"]) == (52, 4)
        assert all(same(whole.layers[n], mixed.layers[n]) for n in whole.layers)

    def test_a_probe_without_any_instruction_is_refused(self) -> None:
        silent = prompts()[0].clone()
        silent[:, :3] = 0
        with pytest.raises(ValueError, match="none of the probe's 16 records"):
            fit(FISHER, Transformer(), [silent])

    def test_more_directions_than_the_probe_spans_are_refused_with_the_numbers(self) -> None:
        silent = prompts()[0].clone()
        silent[:6, :3] = 0
        with pytest.raises(ValueError, match=r"rank is 12, but 16 records less 6 .* span only 9 of 16"):
            fit(replace(FISHER, rank=12), Transformer(), [silent])

    def test_a_probe_of_one_instruction_spans_nothing(self) -> None:
        with pytest.raises(ValueError, match="span only 0 of 16"):
            fit(replace(FISHER, rank=1), Transformer(), [prompts()[0][:1].expand(9, 6)])

    def test_an_output_that_is_not_finite_is_refused(self) -> None:
        model = Transformer()
        model.layers[3].up_proj.bias.fill_(torch.nan)
        with pytest.raises(ValueError, match="output is not finite"):
            fit(FISHER, model, prompts())

    def test_an_artifact_must_say_what_it_is_made_from(self) -> None:
        with pytest.raises(ValueError, match="commit"):
            FISHER.build().fit(Transformer(), prompts(), {"probe_sha256": "c0ffee"})


class TestControls:
    """Orders that know nothing of what the output depends on."""

    def test_variance_keeps_the_order_of_the_principal_components(self) -> None:
        found = fit(replace(FISHER, order="variance"), *planted()).layers[1]
        variances = torch.linalg.eigvalsh(found.covariance).flip(0)
        torch.testing.assert_close(found.scores, variances)
        spread = (found.basis.double().T @ found.covariance @ found.basis.double()).diagonal()
        torch.testing.assert_close(spread, variances, rtol=1e-5, atol=0)
        by_score = fit(FISHER, *planted()).layers[1]
        assert principal_angles(found.fragile, by_score.fragile).max() > 0.1
        assert principal_angles(found.basis, by_score.basis).max() < 1e-3, "the same directions, ordered otherwise"

    def test_random_directions_are_orthonormal_seeded_and_of_no_account(self) -> None:
        def drawn(seed: int) -> Subspaces:
            return fit(replace(FISHER, order="random", seed=seed), Transformer(), prompts())

        one, again, other = drawn(0), drawn(0), drawn(1)
        for number, layer in one.layers.items():
            torch.testing.assert_close(layer.basis.T @ layer.basis, torch.eye(8))
            assert layer.fragile.shape == layer.plastic.shape == (16, 4)
            assert layer.scores.isnan().all()
            assert torch.equal(layer.basis, again.layers[number].basis)
            assert principal_angles(layer.basis, other.layers[number].basis).max() > 0.1
        first, second = (layer.basis for layer in one.layers.values())
        assert principal_angles(first, second).max() > 0.1

    def test_they_need_no_injection(self) -> None:
        """A probe that spans less than the rank is no matter to random directions."""
        model, batches = planted()
        few = [(hidden[:3], mask[:3]) for hidden, mask in batches[:1]]
        with pytest.raises(ValueError, match="span only 2"):
            fit(replace(INJECTION, order="variance"), model, few)
        assert fit(replace(INJECTION, order="random"), model, few).layers[1].basis.shape == (8, 8)
        with pytest.raises(ValueError, match="only 8 wide"):
            fit(ICSMConfig(rank=9, order="random"), model, few)

    def test_the_artifact_says_which_it_is(self) -> None:
        for order in ("sensitivity", "variance", "random"):
            assert fit(replace(FISHER, order=order), Transformer(), prompts()).meta["order"] == order


class TestLastLayerTrap:
    def test_a_head_at_an_action_position_moves_the_last_groups_representative(self) -> None:
        found = fit(INJECTION, Transformer(), prompts())
        assert [(g.layers, g.representative) for g in found.groups] == [((2, 3), 3), ((4, 5), 4)]
        assert found.meta["carries_nothing"]
        assert found.for_layer(5).layer == 4
        assert (found.for_layer(5).scores > 0).all()

    def test_a_head_that_reads_all_positions_moves_nothing(self) -> None:
        found = fit(FISHER, Transformer(reads_all=True), prompts())
        assert [group.representative for group in found.groups] == [3, 5]
        assert not found.meta["carries_nothing"]

    def test_the_energy_report_names_the_layer(self) -> None:
        energy = fit(FISHER, Transformer(), prompts()).meta["energy"]
        assert [n for n, layer in energy.items() if layer["carries_nothing"]] == ["5"]
        assert energy["5"] == {"instruction_share": 0, "fragility": 0, "carries_nothing": True}
        assert all(0 < energy[n]["instruction_share"] < 1 and energy[n]["fragility"] > 0 for n in "01234")

    def test_in_the_trap_the_order_means_nothing(self) -> None:
        icsm, model = FISHER.build(), Transformer()
        trapped = replace(icsm.fit(model, prompts(), META).layers[4], layer=5)
        measured, *_ = icsm._measure(model, prompts(), [5])
        assert icsm._agreement(measured[5], trapped) is None

    def test_a_single_direction_has_no_order(self) -> None:
        found = fit(ICSMConfig(rank=1), Transformer(), prompts())
        assert found.meta["agreement"] == dict.fromkeys(map(str, found.layers))

    def test_an_instruction_that_never_reaches_the_output_is_an_error(self) -> None:
        class Deaf(Reader):
            def read(self, batch: tuple[Tensor, Tensor]) -> Reading:
                reading = super().read(batch)
                return replace(reading, output=reading.hidden[-1][:, -1, :CHOICES])

        model, batches = planted()
        with pytest.raises(ValueError, match="no instruction token reaches the output"):
            fit(ICSMConfig(rank=2), Deaf(model.weight), batches)


def test_subspaces_of_the_tiny_backbone_go_to_disk_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28).eval()
    words = ["press the red button", "open the drawer", "put the cup on the plate", "lift the bowl"]
    batches = [inputs_for(backbone, words, seed) for seed in range(3)]
    found = fit(ICSMConfig(rank=4), ProbedBackbone(backbone), batches)
    assert [(g.layers, g.representative) for g in found.groups] == [((2, 3), 3), ((4, 5), 4)]
    found.save(tmp_path)
    loaded = Subspaces.load(tmp_path, backbone="tiny", width=32, probe_sha256="c0ffee", num_layers=6)
    assert all(same(loaded.layers[n], found.layers[n]) for n in (3, 4))
    required = {"rank", "epsilon", "fragile_share", "scoring", "records", "empty_masks", "versions", "commit"}
    assert required <= loaded.meta.keys()
    assert loaded.meta == {**found.meta, **{n: loaded.meta[n] for n in loaded.meta.keys() - found.meta.keys()}}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "icsm.rank is 0"),
        ({"labels": 0}, "icsm.labels is 0"),
        ({"epsilon": 0.0}, "icsm.epsilon is 0"),
        ({"scoring": "guess"}, 'choose "injection" or "fisher"'),
        ({"order": "guess"}, r"icsm.order is 'guess'"),
        ({"fragile_share": 1.5}, r"icsm.fragile_share is 1\.5"),
        ({"last": 3}, "last is 3"),
    ],
)
def test_a_config_checks_itself(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ICSMConfig(**wrong)
