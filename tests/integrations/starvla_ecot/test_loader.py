"""Reasoning that is missing, or about other data, never stops StarVLA's training and never passes in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from integrations.starvla_ecot import get_vla_dataset_ecot

JSON = "datasets.vla_data.ecot.reasoning_json"
Make = Callable[..., dict[str, Any]]


def reasonings(cfg: dict[str, Any]) -> set[str]:
    return {sample["reasoning"] for sample in get_vla_dataset_ecot(cfg)}


def test_no_file_wanted_is_no_reasoning_and_no_message(make_cfg: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert reasonings(make_cfg(**{JSON: None})) == {""}
    assert not [record for record in caplog.records if "reasoning" in record.message]


def test_an_unknown_file_that_is_missing_says_what_to_do(
    make_cfg: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert reasonings(make_cfg(**{JSON: str(tmp_path / "mine.json")})) == {""}
    (record,) = [record for record in caplog.records if "reasoning" in record.message]
    assert "mine.json does not exist" in record.message
    assert JSON in record.message
    assert str(tmp_path) not in record.message, "logs do not tell paths"


def test_a_fetch_that_fails_says_why_and_what_to_do(
    make_cfg: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise OSError("disk is full")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    get_vla_dataset_ecot(make_cfg(**{JSON: str(tmp_path / "embodied_features_bridge.json")}))
    assert "cannot be fetched from Embodied-CoT/embodied_features_bridge" in caplog.text
    assert "training goes on with the actions alone" in caplog.text


def test_a_file_about_other_data_is_told(make_cfg: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "others.json"
    path.write_text(json.dumps({"/home/me/out.npy": {"1": {"0": {"plan": "p"}}}}))
    with caplog.at_level("INFO", "integrations.starvla_ecot"):
        assert reasonings(make_cfg(**{JSON: str(path)})) == {""}
    assert "bridge_orig: 0 of 6 episodes have reasoning: no such file_path" in caplog.text
    assert "reasoning=none" in caplog.text
    assert "/home/me" not in caplog.text, "logs do not tell paths"
