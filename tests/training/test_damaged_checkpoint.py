"""A policy or a checkpoint that is damaged in any way is refused by one line, within a second, or is whole."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.damage import Trials, damaged
from ipvla.experiment import ExperimentConfig
from ipvla.policy import CheckpointError, Policy, policy_contract
from ipvla.training.checkpoint import load_checkpoint, require_whole, save_checkpoint
from ipvla.training.parallel import World

Make = Callable[..., ExperimentConfig]
WORLD = World()
FILES = (
    "training.json",
    "optimizer.safetensors",
    "lanes-0.safetensors",
    "policy/policy.json",
    "policy/model.safetensors",
)


class Kept:
    """A checkpoint after a step, and a run that would go on from it."""

    def __init__(self, config: ExperimentConfig, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.experiment = config.build(WORLD)
        loss = sum(p.square().sum() for p in self.experiment.state.model.parameters() if p.requires_grad)
        loss.backward()  # type: ignore[union-attr]
        self.experiment.state.optimizer.step()
        self.experiment.state.step = 1
        save_checkpoint(directory, self.experiment.state, self.experiment.policy, WORLD, config.identity)

    def load(self, directory: Path | None = None) -> None:
        load_checkpoint(directory or self.directory, self.experiment.state, WORLD, self.config.identity)


@pytest.fixture
def kept(make_experiment: Make, tmp_path: Path) -> Kept:
    return Kept(make_experiment(), tmp_path / "kept")


def refused(load: Callable[[], object]) -> str:
    """What it says; CPU time, since others use this machine too."""
    began = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load()
    assert time.process_time() - began < 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_whatever_happens_to_a_file_it_is_a_checkpoint_or_refused(kept: Kept, tmp_path: Path, file: str) -> None:
    rng = np.random.default_rng(0)
    content, copy = (kept.directory / file).read_bytes(), tmp_path / "copy"
    trials = Trials(CheckpointError)
    for _ in range(40):
        shutil.copytree(kept.directory, copy, copy_function=os.link)
        (copy / file).unlink()
        (copy / file).write_bytes(damaged(content, rng))
        trials.load(lambda: Policy.load(copy / "policy"))
        trials.load(lambda: policy_contract(copy / "policy"))
        trials.load(lambda: kept.load(copy))
        shutil.rmtree(copy)
    assert trials.broken == []
    assert trials.refused > 0
    assert trials.slowest_s < 1


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(format=99), r"format 99; this version of the program reads 1"),
        (lambda d: d.pop("format"), "format None"),
        (lambda d: d.pop("model"), "KeyError"),
        (lambda d: d["model"]["backbone"].update(width=10**6, heads=1), "far larger than its weights|allocate"),
        (lambda d: d["model"]["backbone"].update(width=64_000), "far larger than its weights"),
        (lambda d: d["model"]["backbone"].update(layers=10**7), "far larger than its weights"),
        (lambda d: d["model"]["backbone"].update(pretrained="evil/model"), "evil/model"),
        (lambda d: d.update(execute="x"), "invalid literal"),
        (lambda d: d.update(transforms=[]), "list"),
    ],
)
def test_a_policys_record(kept: Kept, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    changed(kept.directory / "policy" / "policy.json", change)
    message = refused(lambda: Policy.load(kept.directory / "policy"))
    assert any(part in message for part in reason.split("|")), message


@pytest.mark.parametrize("file", ["policy.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (gzip.compress(b"{}", mtime=0), "gunzip"),
        (b"PK\x03\x04", "torch.save"),
    ],
)
def test_a_foreign_file_is_named(kept: Kept, file: str, content: bytes, reason: str) -> None:
    (kept.directory / "policy" / file).unlink()
    (kept.directory / "policy" / file).write_bytes(content)
    assert reason in refused(lambda: Policy.load(kept.directory / "policy"))


@pytest.mark.parametrize("file", ["policy.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(kept: Kept, file: str) -> None:
    path = kept.directory / "policy" / file
    path.unlink()
    os.mkfifo(path)
    assert "regular file" in refused(lambda: Policy.load(kept.directory / "policy"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.pop("step"), "'step'"),
        (lambda d: d.update(step=-5), "-5"),
        (lambda d: d.update(world="x"), "'x'"),
        (lambda d: d.update(world=10**9), "world is"),
        (lambda d: d["position"].update(window=10**15), "1000000000000000"),
        (lambda d: d["position"].update(before=[{"lanes": 1}]), "Layout"),
        (lambda d: d.update(identity=[]), "list"),
    ],
)
def test_a_checkpoints_record(kept: Kept, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    changed(kept.directory / "training.json", change)
    assert reason in refused(kept.load)
    assert reason in refused(lambda: require_whole(kept.directory))


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("optimizer", lambda d: d.update(x=torch.zeros(1)), "unpack"),
        ("optimizer", lambda d: d.update({f"{10**6}.exp_avg": torch.zeros(1)}), "out of range"),
        ("optimizer", lambda d: d.pop("0.exp_avg"), "moments of the optimizer are missing"),
        ("optimizer", lambda d: d.update({"0.exp_avg": torch.zeros(3, 5, 7)}), "(3, 5, 7)"),
        ("optimizer", lambda d: d["0.exp_avg"].fill_(torch.nan), "0.exp_avg is not finite"),
        ("lanes-0", lambda d: d.pop("random.cpu"), "random.cpu"),
        ("lanes-0", lambda d: d.update({"random.cpu": torch.zeros(3)}), "RNG state"),
        ("policy/model", lambda d: next(iter(d.values())).fill_(torch.nan), "is not finite"),
    ],
)
def test_a_checkpoints_tensors(
    kept: Kept, file: str, change: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    with_tensors(kept.directory / f"{file}.safetensors", change)
    assert reason in refused(kept.load)


def test_a_changed_bit_is_noticed_that_leaves_weights_finite(kept: Kept, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = kept.directory / "policy" / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in rng.integers(header, len(content), 20):
        damaged_file = bytearray(content)
        damaged_file[place] ^= 1
        path.write_bytes(damaged_file)
        assert "is damaged" in refused(lambda: Policy.load(kept.directory / "policy"))
        assert "is damaged" in refused(kept.load)
    path.write_bytes(content)
    kept.load()


def test_a_policy_of_an_earlier_version_has_no_sum_and_loads(kept: Kept) -> None:
    changed(kept.directory / "policy" / "policy.json", lambda record: record.pop("weights_sum"))
    Policy.load(kept.directory / "policy")
