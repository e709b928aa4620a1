"""The user's configuration: the contract's keys, in mappings or objects, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
from collections import UserDict, UserList
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from integrations.starvla_ecot import EcotConfig, read_config
from ipvla.storage import SOURCE_TREE

Cfg = Callable[..., dict[str, Any]]
ECOT = "datasets.vla_data.ecot"


def _objects(node: Any) -> Any:
    return SimpleNamespace(**{k: _objects(v) for k, v in node.items()}) if isinstance(node, dict) else node


def _own_classes(node: Any) -> Any:
    """Mappings and lists of other classes than Python's, as OmegaConf's are."""
    if isinstance(node, dict):
        return UserDict({k: _own_classes(v) for k, v in node.items()})
    return UserList(node) if isinstance(node, list) else node


def _dataclasses(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    values = {k: _dataclasses(v) for k, v in node.items()}
    return dataclasses.make_dataclass("Section", list(values))(**values)


def test_the_defaults_are_the_contracts(make_cfg: Cfg) -> None:
    cfg = make_cfg()
    cfg["datasets"]["vla_data"] = {
        "dataset_py": "ecot_rlds",
        "ecot": {"data_root_dir": "/data", "data_mix": "bridge"},
    }
    cfg["framework"] = {}
    config = read_config(cfg)
    assert config.ecot.shuffle_buffer_size == 256_000
    assert (config.ecot.image_aug, config.ecot.train, config.ecot.scheduled_stage) == (False, True, 0)
    assert (config.chunk, config.action_dim, config.vlm_cot_scale) == (16, 7, 0)


@pytest.mark.parametrize("form", [dict, _objects, _own_classes, _dataclasses])
def test_any_form_of_configuration_is_read(make_cfg: Cfg, form: Callable[[Any], Any]) -> None:
    cfg = make_cfg(**{"trainer.loss_scale": {"vla": 2.0, "vlm_cot": 0.1}, "seed": 3, f"{ECOT}.scheduled_stage": 3})
    config = read_config(form(cfg))
    assert config == read_config(cfg)
    assert (config.vla_scale, config.vlm_cot_scale, config.seed) == (2.0, 0.1, 3)
    assert (config.image_size, config.ecot.scheduled_stage) == ((32, 40), 3)


def test_the_example_has_the_contracts_shape() -> None:
    cfg = yaml.safe_load((SOURCE_TREE / "integrations" / "starvla_ecot" / "bridge.yaml").read_text())
    config = read_config(cfg)
    assert isinstance(config, EcotConfig)
    assert set(cfg["datasets"]["vla_data"]["ecot"]) == {f.name for f in dataclasses.fields(config.ecot)}
    assert (config.image_size, config.chunk, config.vlm_cot_scale) == ((224, 224), 16, 0)


def test_one_number_is_a_square_image(make_cfg: Cfg) -> None:
    assert read_config(make_cfg(**{"datasets.vla_data.image_size": 224})).image_size == (224, 224)


def test_keys_of_other_data_paths_may_stay(make_cfg: Cfg) -> None:
    """To go back to LeRobot's data path, `dataset_py` alone is changed."""
    cfg = make_cfg(**{"datasets.vla_data.action_type": "delta_qpos", "datasets.vlm_data": {}, "run_id": "a"})
    assert read_config(cfg) == read_config(make_cfg())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            f"{ECOT}.shuffle_buffer",
            3,
            r"unknown key datasets\.vla_data\.ecot\.shuffle_buffer; did you mean shuffle_",
        ),
        (f"{ECOT}.zzz", 3, r"unknown key datasets\.vla_data\.ecot\.zzz; known are"),
        (
            "datasets.vla_data.image_sizes",
            3,
            r"unknown key datasets\.vla_data\.image_sizes; did you mean image_size",
        ),
        (
            "datasets.vla_data.dataset_py",
            "lerobot_datasets",
            r"dataset_py is 'lerobot_datasets'; set it to 'ecot_rl",
        ),
        ("datasets.vla_data.ecot", None, r"no section datasets\.vla_data\.ecot"),
        ("datasets", None, r"no section datasets"),
        (f"{ECOT}.data_mix", "", r"ecot\.data_mix is ''"),
        (f"{ECOT}.reasoning_json", 3, r"ecot\.reasoning_json is 3"),
        (f"{ECOT}.scheduled_stage", -1, r"ecot\.scheduled_stage is -1"),
        (f"{ECOT}.scheduled_stage", 1.5, r"ecot\.scheduled_stage is 1\.5"),
        (f"{ECOT}.reasoning_dropout_prob", 1.1, r"reasoning_dropout_prob is 1\.1; give a number in \[0, 1\]"),
        (f"{ECOT}.reasoning_dropout_prob", "0.2", r"reasoning_dropout_prob is '0\.2'"),
        (f"{ECOT}.shuffle_buffer_size", 0, r"shuffle_buffer_size is 0"),
        (f"{ECOT}.image_aug", 1, r"image_aug is 1; give true or false"),
        (f"{ECOT}.num_parallel_calls", "auto", r"num_parallel_calls is 'auto'; .* or 'autotune'"),
        ("datasets.vla_data.image_size", [224], r"image_size is \[224\]"),
        ("datasets.vla_data.per_device_batch_size", 0, r"per_device_batch_size is 0"),
        ("datasets.vla_data.CoT_prompt", "no place", r"CoT_prompt is 'no place'; write \{instruction\}"),
        ("framework.action_model.future_action_window_size", -1, r"future_action_window_size is -1"),
        ("trainer.loss_scale.vlm_cot", -0.1, r"loss_scale\.vlm_cot is -0\.1"),
        ("seed", -1, r"seed is -1"),
    ],
)
def test_what_is_wrong_is_named(make_cfg: Cfg, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_config(make_cfg(**{path: value}))
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(make_cfg: Cfg) -> None:
    cfg = make_cfg()
    del cfg["datasets"]["vla_data"]["ecot"]["data_root_dir"]
    with pytest.raises(ValueError, match=r"ecot\.data_root_dir is missing"):
        read_config(cfg)


def test_the_prompt_is_the_template_with_the_instruction(make_cfg: Cfg) -> None:
    config = read_config(make_cfg(**{"datasets.vla_data.CoT_prompt": "Task: {instruction}. Think {aloud}."}))
    assert config.prompt("grasp it") == "Task: grasp it. Think {aloud}."
    assert read_config(make_cfg()).prompt("grasp it") == "grasp it"
