"""Storage roots: everything large under one directory, none of it among the sources."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.data.standards.generic import StandardConfig
from ipvla.storage import (
    SOURCE_TREE,
    StorageError,
    StorageRoots,
    absolute_paths,
    home_is_writable,
    require_room,
)

FLAGS = ("cache_dir", "data_root_dir", "probe_root_dir", "artifact_dir", "run_root_dir", "tmp_dir")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("IPVLA_STORAGE_ROOT", "MLFLOW_TRACKING_URI", "HF_HOME", "HF_DATASETS_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, "")  # so that what `prepare` sets is undone
        monkeypatch.delenv(name)


def test_the_default_lies_outside_the_source_tree():
    assert not StorageRoots().root.is_relative_to(SOURCE_TREE)


def test_the_root_is_the_flag_else_the_environments_else_in_the_home_directory(monkeypatch):
    assert StorageRoots().root == Path.home() / "ipvla_storage"
    monkeypatch.setenv("IPVLA_STORAGE_ROOT", "/data/x")
    assert StorageRoots().root == Path("/data/x")
    assert StorageRoots(storage_root=Path("/data/y")).root == Path("/data/y")


@given(st.dictionaries(st.sampled_from(FLAGS), st.from_regex(r"/elsewhere/[a-z]+", fullmatch=True).map(Path)))
def test_each_directory_is_the_one_given_or_its_own_place_under_the_root(given_directories):
    directories = StorageRoots(storage_root=Path("/data"), **given_directories).directories
    assert tuple(directories) == FLAGS
    assert {flag: directories[flag] for flag in given_directories} == given_directories
    others = [path for flag, path in directories.items() if flag not in given_directories]
    assert all(path.parent == Path("/data") for path in others)
    assert len(set(others)) == len(others)


def test_prepare_creates_the_directories_and_keeps_downloads_in_the_cache(tmp_path):
    roots = StorageRoots(storage_root=tmp_path)
    roots.prepare()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in roots.directories.values()}
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "TORCH_HOME"):
        assert Path(os.environ[name]).is_relative_to(roots.cache)


def test_prepare_leaves_the_users_own_cache_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/mine")
    StorageRoots(storage_root=tmp_path).prepare()
    assert os.environ["HF_HOME"] == "/mine"


@pytest.mark.parametrize("flag", FLAGS)
def test_a_directory_among_the_sources_is_refused_with_a_remedy(tmp_path, flag):
    inside = SOURCE_TREE / "never"
    with pytest.raises(
        StorageError, match=f"--{flag} .*never lies inside the source tree .*; pass --storage_root"
    ):
        StorageRoots(storage_root=tmp_path, **{flag: inside}).prepare()
    assert not inside.exists()


def test_a_way_around_into_the_sources_is_seen(tmp_path):
    (tmp_path / "link").symlink_to(SOURCE_TREE)
    with pytest.raises(StorageError, match="lies inside the source tree"):
        StorageRoots(storage_root=tmp_path / "link" / "never").prepare()


def test_an_unwritable_root_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be written \(.*\); pass a writable --storage_root"):
        StorageRoots(storage_root=tmp_path / "file").prepare()


def test_datasets_may_lie_where_nobody_can_write(tmp_path):
    roots = StorageRoots(storage_root=tmp_path, data_root_dir=Path("/proc"), artifact_dir=Path("/proc"))
    roots.prepare()
    roots.prepare(writes=("probe_root_dir",))
    with pytest.raises(StorageError, match=r"--data_root_dir /proc cannot be written"):
        roots.prepare(writes=("data_root_dir",))
    with pytest.raises(StorageError, match=r"--run_root_dir /proc cannot be written"):
        StorageRoots(storage_root=tmp_path, run_root_dir=Path("/proc")).prepare()


def test_mlflows_database_has_an_absolute_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert StorageRoots(storage_root=Path("here")).mlflow_uri == f"sqlite:///{tmp_path}/here/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert StorageRoots().mlflow_uri == "http://tracking:5000"


@pytest.mark.parametrize("flag", ["storage_root", *FLAGS])
def test_an_address_is_no_directory(flag):
    roots = StorageRoots(**{flag: Path("s3://bucket/x")})
    with pytest.raises(StorageError, match=f"--{flag} s3:/bucket/x is an address; give a directory of a file"):
        roots.prepare()
    assert not Path("s3:").exists()


@pytest.mark.parametrize("flag", ["storage_root", "run_root_dir"])
def test_a_question_mark_is_refused_where_the_mlflow_database_would_lie(flag, tmp_path):
    roots = StorageRoots(**{flag: tmp_path / "q?x=1&y"})
    with pytest.raises(StorageError, match=r"^--run_root_dir .*/q\?x=1&y.*: a path with \? cannot hold"):
        roots.prepare()
    assert list(tmp_path.iterdir()) == []
    StorageRoots(storage_root=tmp_path / "plain", data_root_dir=tmp_path / "data?").prepare()


def test_absolute_paths_stay_where_they_were_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPVLA_STORAGE_ROOT", "store")
    roots = StorageRoots(cache_dir=Path("c"), run_root_dir=Path("~/runs")).absolute()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    assert (roots.root, roots.cache) == (tmp_path / "store", tmp_path / "c")
    assert roots.runs == Path.home() / "runs"
    assert StorageRoots().absolute().root == tmp_path / "other" / "store"


@dataclass(frozen=True)
class Inner:
    file: Path | None = None
    name: str = "x/y"


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner(Path("a"))
    out: Path = Path("~/b")
    sizes: tuple[int, ...] = (1,)


def test_every_path_in_a_tree_of_settings_becomes_absolute():
    found = absolute_paths(Outer())
    assert found == Outer(Inner(Path.cwd() / "a"), Path.home() / "b")
    assert absolute_paths(found) == found


def test_a_setting_may_be_called_absolute():
    """As in `data.standard`, where it says which numbers of an action are positions."""
    standard = StandardConfig({"front": "observation/image"}, absolute=True)
    assert absolute_paths(standard) == standard


def test_a_user_without_a_home_is_asked_for_a_storage_root(tmp_path, monkeypatch):
    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(StorageError, match="this user has no home directory; pass --storage_root or set IPVLA"):
        StorageRoots().prepare()
    assert not home_is_writable()


def test_only_who_has_no_home_gets_numbas_cache_in_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    StorageRoots(storage_root=tmp_path).prepare()
    assert "NUMBA_CACHE_DIR" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    StorageRoots(storage_root=tmp_path).prepare()
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "cache" / "numba")


def test_room_is_asked_of_the_disk_that_a_path_will_lie_on(tmp_path):
    require_room(tmp_path / "not" / "there", 1, "its files", "or wait")
    with pytest.raises(StorageError, match=r"GiB are free, and its files take 1048576\.0; free some, or wait$"):
        require_room(tmp_path / "not" / "there", 2**50, "its files", "or wait")


def test_the_default_root_is_that_of_who_asks_not_of_who_works(monkeypatch):
    assert StorageRoots().absolute().storage_root == Path.home() / "ipvla_storage"
