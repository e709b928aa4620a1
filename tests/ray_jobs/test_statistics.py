"""Statistics as a job: once, by several processes, the same as in one."""

from __future__ import annotations

import json
import pickle
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ipvla.data.rlds import write_rlds
from ipvla.data.source import DatasetError
from ipvla.data.standards import StandardConfig
from ipvla.data.statistics import Statistics
from ipvla.data.survey import Survey, combined, surveyed
from ray_jobs import statistics
from ray_jobs.command_line.settings import parse
from ray_jobs.statistics import PartReader, StatisticsConfig, main, survey
from tests.synthetic import SIZE, cue_episode


@pytest.fixture
def config(tmp_path: Path) -> StatisticsConfig:
    write_rlds(tmp_path / "datasets", "cue", [cue_episode(seed) for seed in range(6)], SIZE)
    return StatisticsConfig(storage_root=tmp_path, dataset="cue")


def _in_this_process(config: StatisticsConfig) -> Survey:
    source = config.open_source()
    return surveyed(source, config.standard_of(source), config.read_root)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_several_processes_find_what_one_finds(
    config: StatisticsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipvla.data.survey.PART_EPISODES", 2)
    found, path = survey(replace(config, cache_dir=tmp_path / "other", out=tmp_path / "out" / "cue.json"))
    assert path.is_file()
    assert found.to_dict() == _in_this_process(config).to_dict()
    assert Statistics.load(tmp_path / "out" / "cue.json").to_dict() == found.statistics.to_dict()


def test_parts_read_by_other_processes_make_the_survey(config: StatisticsConfig) -> None:
    source = config.open_source()
    standard = config.standard_of(source)
    reader = PartReader(config.open_source, standard)
    rows = [reader({"first": first, "stop": first + 3}) for first in (3, 0)]
    found = combined((pickle.loads(row["part"]) for row in rows), source, standard)
    assert found.to_dict() == _in_this_process(config).to_dict()


def test_other_processes_can_be_sent_what_they_need(config: StatisticsConfig) -> None:
    source = config.open_source()
    standard = config.standard_of(source)
    opened, sent = pickle.loads(pickle.dumps((config.open_source, standard)))
    assert sent == standard
    assert opened().lengths.tolist() == source.lengths.tolist()


def test_what_was_read_before_is_told_without_a_cluster(
    config: StatisticsConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _in_this_process(config)

    @contextmanager
    def no_cluster(*_: object, **__: object):
        pytest.fail("a cluster was started")
        yield

    monkeypatch.setattr(statistics, "connect", no_cluster)
    assert survey(config)[0].to_dict() == found.to_dict()
    main(config)
    told = " ".join(capsys.readouterr().out.split())
    assert f"{int(found.lengths.sum())} control steps of 6 episodes" in told


def test_statistics_are_written_in_openvlas_schema(config: StatisticsConfig, tmp_path: Path) -> None:
    found = _in_this_process(config)
    out = tmp_path / "there" / "cue.json"
    survey(replace(config, out=out))
    assert list(json.loads(out.read_text())) == ["cue"]
    assert Statistics.load(out, name="cue").to_dict() == found.statistics.to_dict()


def test_its_statistics_are_those_that_were_written_with_the_dataset(config: StatisticsConfig) -> None:
    beside = Statistics.load(Path(config.location) / "dataset_statistics.json")
    found = _in_this_process(config).statistics
    for row in ("mean", "std", "min", "max", "q01", "q99", "mask"):
        np.testing.assert_allclose(getattr(found.action, row), getattr(beside.action, row), rtol=1e-6, atol=1e-6)


def test_a_dataset_is_named_or_located(tmp_path: Path) -> None:
    named = StatisticsConfig(data_root_dir=tmp_path, dataset="bridge_orig")
    assert named.location == str(tmp_path / "bridge_orig" / "1.0.0")
    assert StatisticsConfig(dataset="s3://bucket/droid/1.0.1").location == "s3://bucket/droid/1.0.1"


def test_settings_are_read_from_the_command_line() -> None:
    arguments = ["--dataset", "mine", "--skip_noops", "true", "--standard.cameras", "{front: observation/image}"]
    config = parse(StatisticsConfig, [*arguments, "--standard.gripper", "none", "--standard.action", "[action]"])
    assert config.skip_noops
    assert config.standard == StandardConfig({"front": "observation/image"}, ("action",), gripper="none")


def test_settings_decide_the_standard(config: StatisticsConfig) -> None:
    source = config.open_source()
    assert replace(config, skip_noops=True).standard_of(source).skip_noops
    chosen = replace(config, standard=StandardConfig({"front": "observation/image"})).standard_of(source)
    assert chosen.cameras == {"front": "observation/image"}
    with pytest.raises(DatasetError, match="padded_state is true"):
        replace(config, padded_state=True).standard_of(source)


def test_a_missing_dataset_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        survey(StatisticsConfig(storage_root=tmp_path, dataset="nothing"))
