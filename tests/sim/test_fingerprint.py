"""The fingerprint names everything that changes physics or pixels."""

from importlib.metadata import version

from ipvla.sim.fingerprint import fingerprint
from ipvla.sim.recall.tasks import VERSION


def test_it_holds_the_installed_versions_and_the_renderer(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    found = fingerprint()
    assert found["mujoco"] == version("mujoco")
    assert found["libero"] == version("hf-libero")
    assert found["renderer"] == "osmesa"
    assert found["recall"] == VERSION
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert fingerprint()["renderer"] == "egl"
    assert all(isinstance(value, str) for value in found.values())
