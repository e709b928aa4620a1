"""The fingerprint names everything that changes physics or pixels."""

import platform
from importlib.metadata import version

from ipvla.rollout.journal import Journal
from ipvla.sim.recall.tasks import VERSION
from ipvla.sim.suites import fingerprint


def test_it_holds_the_installed_versions_and_the_renderer(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    found = fingerprint()
    assert found["mujoco"] == version("mujoco")
    assert found["libero"] == version("hf-libero")
    assert found["renderer"] == "osmesa"
    assert found["recall"] == VERSION
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert fingerprint()["renderer"] == "egl"
    assert all(isinstance(value, str) for value in found.values())


def test_a_journal_is_resumed_and_merged_under_another_kernel(monkeypatch, tmp_path):
    kernels = ("Linux-6.18.44-x86_64-with-glibc2.36", "Linux-5.15.0-91-generic-x86_64-with-glibc2.35")
    for name, kernel in zip("ab", kernels, strict=True):
        monkeypatch.setattr(platform, "platform", lambda kernel=kernel: kernel)
        Journal(tmp_path / f"{name}.sqlite", fingerprint()).close()
    Journal(tmp_path / "a.sqlite", fingerprint()).close()
    Journal.merged([tmp_path / "a.sqlite", tmp_path / "b.sqlite"], tmp_path / "all.sqlite").close()
