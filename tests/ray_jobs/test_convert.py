"""`ipvla convert`: settings become a conversion, and Ray Data converts its parts."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ipvla.data.conversion import Comparison, Part
from ipvla.data.lerobot import LeRobotSource, VideoSettings
from ipvla.data.rlds import RldsSource
from ipvla.data.source import DatasetError
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.settings import SettingError, parse
from ray_jobs.convert import ConvertConfig, convert, summary, with_ray_data
from tests.data.lerobot.conftest import LENGTHS, layout, trajectories
from tests.data.lerobot.writing import write_lerobot


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lerobot(tmp_path_factory.mktemp("source") / "robot", layout(), trajectories())


@pytest.fixture
def config(source: Path, tmp_path: Path) -> ConvertConfig:
    return ConvertConfig(
        storage_root=tmp_path, source=str(source), to="rlds", name="robot", episodes_per_part=2, num_cpus=1
    )


def here(work: Callable[[Part], Any], parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
    """Distributes over this process alone, last part first."""
    for part in reversed(parts):
        yield part, work(part)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_settings_become_a_conversion(tmp_path):
    arguments = "--source ~/bridge --to lerobot --name bridge --fps 5 --video true --encoding.crf 20"
    config = parse(
        ConvertConfig, [*arguments.split(), "--storage_root", str(tmp_path), "--leave_out", "[a/b]"]
    ).build()
    assert config.source == str(Path.home() / "bridge")
    assert config.target == tmp_path / "datasets" / "bridge"
    assert (config.fps, config.video, config.leave_out) == (5, VideoSettings(crf=20), ("a/b",))


def test_an_address_stays_as_it_is_and_rlds_gets_a_version(tmp_path):
    config = ConvertConfig(storage_root=tmp_path, source="gs://b/c/1.0.0", to="rlds", name="c").build()
    assert config.source == "gs://b/c/1.0.0"
    assert config.target == tmp_path / "datasets" / "c" / "1.0.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "say what to convert, to what and under which name"),
        ("--source a --to zarr --name b", "choose 'lerobot' or 'rlds'"),
        ("--source a --to lerobot --name b --encoding.codec vp9", "known are 'h264'"),
    ],
)
def test_wrong_settings_are_told(arguments, message):
    with pytest.raises((SettingError, ValueError), match=message):
        parse(ConvertConfig, arguments.split())


def test_parts_may_end_in_any_order(config):
    compared = convert(config.build(), here, quiet())
    assert RldsSource(config.build().target).lengths.tolist() == list(LENGTHS)
    assert summary(config.build(), compared).startswith(f"5 episodes of {sum(LENGTHS)} steps in")


def test_a_second_run_converts_what_the_first_did_not(config):
    def failing(work: Callable[[Part], Any], parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
        yield parts[1], work(parts[1])
        raise DatasetError("the machine died")

    with pytest.raises(DatasetError, match="the machine died"):
        convert(config.build(), failing, quiet())
    done = []

    def counted(work: Callable[[Part], Any], parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
        done.extend(part.number for part in parts)
        return here(work, parts)

    console = quiet()
    assert convert(config.build(), counted, console).episodes == 5
    assert done == [0, 2]
    assert "1 of 3 parts are there already" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("greatest", "told"),
    [(0, "pictures are the same"), (9, "differ by 1.50 levels of 255 on average, and by 9 at most")],
)
def test_the_summary_tells_what_pictures_lost(config, greatest, told):
    compared = Comparison(2, 30, ("a", "b"), greatest, 3 * (greatest > 0), 2)
    assert told in summary(config.build(), compared)


def command(config: ConvertConfig) -> list[str]:
    told = f"--storage_root {config.storage_root} --source {config.source} --to rlds --name robot --num_cpus 1"
    return [sys.executable, "-m", "ray_jobs", "convert", *told.split(), "--episodes_per_part", "1"]


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_conversion_on_ray_goes_on_and_ends_with_the_same_dataset(config, source):
    environment = os.environ | {"PYTHONPATH": str(SOURCE_TREE)}
    first = subprocess.Popen(command(config), cwd=SOURCE_TREE, env=environment, start_new_session=True)
    work = config.build().work
    deadline = time.monotonic() + 180
    while not list(work.glob("part-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not config.build().target.exists(), "it was killed too late to test anything"
    assert list(work.glob("part-*"))
    again = subprocess.run(
        command(config), cwd=SOURCE_TREE, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "parts are there already" in again.stderr
    assert "numbers and texts are equal, pictures are the same" in again.stdout
    found, expected = RldsSource(config.build().target), LeRobotSource(source)
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert [*config.build().target.parent.glob(".*converting")] == []


@pytest.mark.slow
def test_a_broken_part_is_one_line_and_the_others_are_kept(config, source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "broken"))
    (data,) = copy.glob("data/*/*.parquet")
    table = pq.read_table(data)
    column = table.column_names.index("episode_index")
    others = pa.array([9 if number == 4 else number for number in table["episode_index"].to_pylist()])
    pq.write_table(table.set_column(column, "episode_index", others), data)
    broken = ConvertConfig(storage_root=config.storage_root, source=str(copy), to="rlds", name="robot", num_cpus=1)
    ended = subprocess.run(
        command(broken), cwd=SOURCE_TREE, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 2
    assert "episode 4 cannot be read" in ended.stderr.splitlines()[-1]
    assert not broken.build().target.exists()
    assert list(broken.build().work.glob("part-*"))


def test_no_parts_need_no_cluster():
    assert list(with_ray_data(lambda part: None, [])) == []
