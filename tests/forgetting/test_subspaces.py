"""Subspaces on disk: what was saved comes back, what does not belong to this run is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.subspaces import LayerSubspace, Subspaces, layer_groups
from tests.forgetting.made_up import principal_angles

WIDTH = 10
META = {"backbone": "tiny", "width": WIDTH, "num_layers": 8, "probe_sha256": "c0ffee", "records": 30}


def orthonormal(rank: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, rank, generator=random, dtype=torch.float64))[0]


def layer(number: int, fragile: int = 2, plastic: int = 3) -> LayerSubspace:
    basis = orthonormal(fragile + plastic, seed=number).float()
    mean = torch.arange(WIDTH).double() * number
    covariance = torch.eye(WIDTH, dtype=torch.float64) * number
    scores = torch.arange(fragile + plastic, 0, -1).double()
    return LayerSubspace(number, basis[:, :fragile], basis[:, fragile:], mean, covariance, scores)


def made(**sizes: int) -> Subspaces:
    return Subspaces(layer_groups(8), {5: layer(5, **sizes), 7: layer(7, **sizes)}, META)


def load(directory: Path, **other: Any) -> Subspaces:
    return Subspaces.load(directory, **{"backbone": "tiny", "width": WIDTH, "probe_sha256": "c0ffee", **other})


@pytest.mark.parametrize("sizes", [{}, {"plastic": 0}, {"fragile": 0}], ids=str)
def test_what_was_saved_comes_back_bit_for_bit(sizes: dict[str, int], tmp_path: Path) -> None:
    made(**sizes).save(tmp_path / "new")
    loaded = load(tmp_path / "new", num_layers=8)
    assert loaded.groups == layer_groups(8)
    assert META.items() <= loaded.meta.items()
    for number, kept in made(**sizes).layers.items():
        for name in ("fragile", "plastic", "mean", "covariance", "scores"):
            theirs, ours = getattr(loaded.layers[number], name), getattr(kept, name)
            assert theirs.dtype == ours.dtype
            assert torch.equal(theirs, ours)


def test_the_files_say_what_they_hold(tmp_path: Path) -> None:
    made().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "subspaces.safetensors"]
    names = [f"{name}" for n in (5, 7) for name in (f"U{n}_f", f"U{n}_p", f"mu{n}", f"C_T{n}", f"scores{n}")]
    assert sorted(load_file(tmp_path / "subspaces.safetensors")) == sorted(names)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert [group["representative"] for group in meta["groups"]] == [5, 7]
    assert meta["projector_sha256"] == made().projector_sha256()


def test_layers_share_their_groups_subspace_and_no_other_has_one() -> None:
    subspaces = made()
    assert [subspaces.for_layer(n).layer for n in (4, 5, 6, 7)] == [5, 5, 7, 7]
    with pytest.raises(ValueError, match=r"layer 3 .* \[4, 5, 6, 7\]"):
        subspaces.for_layer(3)


@pytest.mark.parametrize(
    "other", [{"backbone": "paligemma"}, {"width": 12}, {"probe_sha256": "decaf"}, {"num_layers": 18}], ids=str
)
def test_those_of_another_model_or_probe_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    made().save(tmp_path)
    ((name, value),) = other.items()
    with pytest.raises(ArtifactError, match=f"{name} {META[name]}, this run has {value}"):
        load(tmp_path, **other)


def _remove(directory: Path) -> None:
    (directory / "subspaces.safetensors").unlink()


def _truncate(directory: Path) -> None:
    path = directory / "subspaces.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _garble(directory: Path) -> None:
    (directory / "meta.json").write_text("{")


def _mix(directory: Path) -> None:
    """The tensors of another fit, as a crash between the two files leaves them."""
    meta = (directory / "meta.json").read_text()
    replace(made(), layers={5: layer(5, 3, 2), 7: layer(7, 3, 2)}).save(directory)
    (directory / "meta.json").write_text(meta)


def _rename_group(directory: Path) -> None:
    meta = json.loads((directory / "meta.json").read_text())
    meta["groups"][0]["representative"] = 4
    (directory / "meta.json").write_text(json.dumps(meta))


def _skew(directory: Path) -> None:
    replace(made(), layers={5: layer(5), 7: replace(layer(7), fragile=torch.ones(WIDTH, 2))}).save(directory)


def _narrow(directory: Path) -> None:
    replace(made(), layers={5: layer(5), 7: replace(layer(7), mean=torch.zeros(3))}).save(directory)


@pytest.mark.parametrize("damage", [_remove, _truncate, _garble, _mix, _rename_group, _skew, _narrow])
def test_what_is_missing_or_damaged_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    made().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError):
        load(tmp_path)


def test_the_projector_hash_knows_spans_not_bases() -> None:
    one = made()
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(1)))[0]
    turned = replace(one.layers[5], fragile=one.layers[5].fragile @ turn)
    swapped = replace(one.layers[5], fragile=one.layers[5].plastic, plastic=one.layers[5].fragile)
    assert replace(one, layers={**one.layers, 5: turned}).projector_sha256() == one.projector_sha256()
    assert replace(one, layers={**one.layers, 5: swapped}).projector_sha256() != one.projector_sha256()


@pytest.mark.parametrize("angle", [0, 1e-9, 1e-3, 0.5, 1.2, math.pi / 2])
def test_principal_angles_are_those_a_basis_was_turned_by(angle: float) -> None:
    axes = orthonormal(6)
    a = axes[:, :2]
    b = torch.stack([math.cos(angle) * axes[:, 0] + math.sin(angle) * axes[:, 2], axes[:, 1], axes[:, 3]], 1)
    expected = torch.tensor([0, angle], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(a, b), expected, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(principal_angles(b, a), expected, rtol=1e-6, atol=1e-14)
