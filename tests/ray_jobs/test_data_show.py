"""`ipvla data show`: a dataset by name or path, its card on the console, its sheet on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvla.data.source import DatasetError
from ipvla.data.standards import StandardConfig
from ipvla.data.survey import survey_path
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.settings import SettingError, parse
from ray_jobs.data.show import ShowConfig, main, show
from ray_jobs.statistics import StatisticsConfig

TENSORFLOW = SOURCE_TREE / "tests" / "data" / "tensorflow" / "libero_spatial_no_noops" / "1.0.0"


def test_it_prints_the_card_and_writes_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ShowConfig(storage_root=tmp_path, dataset=str(TENSORFLOW), strips=2))
    told = " ".join(capsys.readouterr().out.split())
    sheet = tmp_path / "artifacts" / "datasets" / "libero_spatial_no_noops.html"
    assert "15 transitions are fewer than 5,000" in told
    assert told.endswith(f"written: {sheet}")
    assert sheet.read_text().count("<h3>") == 2


def test_a_dataset_is_shown_as_training_sees_it(storage_root: Path, tmp_path: Path) -> None:
    standard = StandardConfig({"front": "observation/image"}, gripper="none", state=("action",))
    card, sheet = show(
        ShowConfig(
            storage_root=tmp_path,
            data_root_dir=storage_root / "datasets",
            dataset="cue",
            standard=standard,
            out=tmp_path / "a" / "sheet.html",
        )
    )
    assert [camera.name for camera in card.cameras] == ["front"]
    assert card.statistics.proprio.dim == 7
    assert sheet == tmp_path / "a" / "sheet.html"


def test_it_reads_what_statistics_reads_and_keeps_it_for_all(tmp_path: Path) -> None:
    settings = {"storage_root": tmp_path, "dataset": str(TENSORFLOW), "padded_state": True}
    show(ShowConfig(**settings))  # type: ignore[arg-type]
    other = StatisticsConfig(**settings)  # type: ignore[arg-type]
    source = other.open_source()
    assert survey_path(other.read_root, source, other.standard_of(source)).is_file()


@pytest.mark.parametrize("given", [["cue"], ["--dataset", "cue"], ["--dataset=cue"]])
def test_the_dataset_may_come_first_without_a_name(given: list[str]) -> None:
    assert parse(ShowConfig, [*given, "--strips", "3"]) == ShowConfig(dataset="cue", strips=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cue", "other"], "argument 'other' is not an option"),
        (["cue", "--sample", "0"], "sample is 0; it must be at least 1"),
        (["cue", "--strip", "2"], "did you mean 'strips'"),
    ],
)
def test_wrong_settings_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse(ShowConfig, arguments)


def test_a_missing_dataset_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        show(ShowConfig(storage_root=tmp_path, dataset="nothing"))
