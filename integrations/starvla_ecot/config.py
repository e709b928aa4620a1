"""The user's configuration: `datasets.vla_data` with its section `ecot`, `framework.action_model`, `trainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from ipvla.choices import nearest

DATASET_PY = "ecot_rlds"
#: A number of threads, or "autotune" for one per core (one in all within a loader's worker).
Parallel: TypeAlias = int | str

#: What is read of `datasets.vla_data`; it may hold more, which other data paths of the same file read.
_VLA_DATA = ("dataset_py", "image_size", "per_device_batch_size", "num_workers", "CoT_prompt", "ecot")


@dataclass(frozen=True)
class EcotSection:
    """`datasets.vla_data.ecot`: an unknown key is an error.

    Attributes:
        data_root_dir: directory or address that holds `<dataset>/<version>/` of each RLDS dataset.
        data_mix: a mixture's name or one dataset's.
        scheduled_stage: k leaves the first min(k, 8) of the eight tags out of the reasoning; 0 is the full one.
        reasoning_dropout_prob: probability of leaving each further tag out: see `ReasoningFilter`.
        shuffle_buffer_size: frames among which the next one is drawn, of all workers of a process together.
        image_aug: random crop and colours, as OpenVLA's.
        reasoning_json: ECoT's reasoning file; a published one that is missing is fetched. None for no reasoning.
        num_parallel_calls: threads that decode and resize frames.
        num_parallel_reads: episodes that are read at the same time.
        train: the split `train`, shuffled; False for the split `val`, in order, without augmentation and dropout.
    """

    data_root_dir: str
    data_mix: str
    scheduled_stage: int = 0
    reasoning_dropout_prob: float = 0.0
    shuffle_buffer_size: int = 256_000
    image_aug: bool = False
    reasoning_json: str | None = None
    num_parallel_calls: Parallel = "autotune"
    num_parallel_reads: Parallel = "autotune"
    train: bool = True

    def __post_init__(self) -> None:
        where = "datasets.vla_data.ecot"
        for name in ("data_root_dir", "data_mix"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{where}.{name} is {getattr(self, name)!r}; give a text")
        if self.reasoning_json is not None and not isinstance(self.reasoning_json, str):
            raise ValueError(f"{where}.reasoning_json is {self.reasoning_json!r}; give a path, or null for none")
        _whole(f"{where}.scheduled_stage", self.scheduled_stage, 0)
        _whole(f"{where}.shuffle_buffer_size", self.shuffle_buffer_size, 1)
        probability = self.reasoning_dropout_prob
        if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise ValueError(f"{where}.reasoning_dropout_prob is {probability!r}; give a number in [0, 1]")
        for name in ("image_aug", "train"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{where}.{name} is {getattr(self, name)!r}; give true or false")
        for name in ("num_parallel_calls", "num_parallel_reads"):
            if getattr(self, name) != "autotune":
                _whole(f"{where}.{name}", getattr(self, name), 1, " or 'autotune'")


@dataclass(frozen=True)
class EcotConfig:
    """All that the adapter reads of the user's file, checked.

    Attributes:
        ecot: the section of its own.
        image_size: (height, width) of every view, pixels.
        per_device_batch_size: samples per batch.
        num_workers: processes that make batches; 0 makes them in this one.
        cot_prompt: `CoT_prompt`, the prompt's template with `{instruction}`, None for the instruction alone.
        past_action_window_size, future_action_window_size: actions before and after the frame's own; a chunk has
            past + 1 + future.
        action_dim: A, which the dataset must have.
        action_horizon: actions that the model takes, if it says so: another number than the chunk's cuts or pads
        it.
        vla_scale, vlm_cot_scale: `trainer.loss_scale`, weights of the action loss and of the reasoning's.
        seed: of order, dropout and augmentation.
    """

    ecot: EcotSection
    image_size: tuple[int, int] = (224, 224)
    per_device_batch_size: int = 16
    num_workers: int = 4
    cot_prompt: str | None = None
    past_action_window_size: int = 0
    future_action_window_size: int = 15
    action_dim: int = 7
    action_horizon: int | None = None
    vla_scale: float = 1.0
    vlm_cot_scale: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        data, model = "datasets.vla_data", "framework.action_model"
        size = self.image_size
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"{data}.image_size is {list(size)}; give [height, width] in pixels")
        _whole(f"{data}.per_device_batch_size", self.per_device_batch_size, 1)
        _whole(f"{data}.num_workers", self.num_workers, 0)
        if self.cot_prompt is not None and "{instruction}" not in str(self.cot_prompt):
            raise ValueError(
                f"{data}.CoT_prompt is {self.cot_prompt!r}; write {{instruction}} where the task goes"
            )
        for name, least in (("past_action_window_size", 0), ("future_action_window_size", 0), ("action_dim", 1)):
            _whole(f"{model}.{name}", getattr(self, name), least)
        if self.action_horizon is not None:
            _whole(f"{model}.action_horizon", self.action_horizon, 1)
        for name, scale in (("vla", self.vla_scale), ("vlm_cot", self.vlm_cot_scale)):
            if isinstance(scale, bool) or not isinstance(scale, int | float) or scale < 0:
                raise ValueError(f"trainer.loss_scale.{name} is {scale!r}; give a number of 0 or more")
        _whole("seed", self.seed, 0)

    @property
    def chunk(self) -> int:
        """Actions that the windows ask for."""
        return self.past_action_window_size + 1 + self.future_action_window_size

    def prompt(self, instruction: str) -> str:
        """What the model is asked: `CoT_prompt` with the instruction in it. Samples carry the bare instruction,
        because StarVLA's models fill the template in themselves."""
        return self.cot_prompt.replace("{instruction}", instruction) if self.cot_prompt else instruction


def read_config(cfg: Any) -> EcotConfig:
    """The adapter's part of a configuration: nested mappings (a YAML file's), or objects with attributes.

    Raises:
        ValueError: a key is missing, unknown or has a value that cannot be; the message names it.
    """
    vla_data = _section(_section(cfg, "datasets", ""), "vla_data", "datasets.")
    named = _get(vla_data, "dataset_py")
    if named != DATASET_PY:
        raise ValueError(f"datasets.vla_data.dataset_py is {named!r}; set it to {DATASET_PY!r} for this data path")
    _refuse_misspelt(vla_data)
    model, scale = _get(_get(cfg, "framework"), "action_model"), _get(_get(cfg, "trainer"), "loss_scale")
    windows = ("past_action_window_size", "future_action_window_size", "action_dim", "action_horizon")
    given = {
        "ecot": _ecot(_section(vla_data, "ecot", "datasets.vla_data.")),
        **{name: _get(vla_data, name) for name in ("image_size", "per_device_batch_size", "num_workers")},
        "cot_prompt": _get(vla_data, "CoT_prompt"),
        **{name: _get(model, name) for name in windows},
        "vla_scale": _get(scale, "vla"),
        "vlm_cot_scale": _get(scale, "vlm_cot"),
        "seed": _get(cfg, "seed"),
    }
    values = {name: value for name, value in given.items() if value is not None}
    if "image_size" in values:
        size = values["image_size"]
        sides = isinstance(size, Sequence) and not isinstance(size, str)
        values["image_size"] = tuple(size) if sides else (size, size)
    return EcotConfig(**values)


def _ecot(section: Any) -> EcotSection:
    known = [field.name for field in fields(EcotSection)]
    for key in _keys(section):
        if key not in known:
            raise ValueError(f"unknown key datasets.vla_data.ecot.{key}{_meant(key, known)}; known are {known}")
    for key in ("data_root_dir", "data_mix"):
        if key not in _keys(section):
            raise ValueError(f"datasets.vla_data.ecot.{key} is missing; every ECoT data path needs it")
    return EcotSection(**{str(key): _get(section, key) for key in _keys(section)})


def _refuse_misspelt(vla_data: Any) -> None:
    for key in _keys(vla_data):
        if key not in _VLA_DATA and (meant := _meant(key, _VLA_DATA)):
            raise ValueError(f"unknown key datasets.vla_data.{key}{meant}")


def _meant(key: str, known: Sequence[str]) -> str:
    near = nearest(str(key), known, likeness=0.8)
    return f"; did you mean {near[0]}?" if near else ""


def _section(node: Any, key: str, where: str) -> Any:
    section = _get(node, key)
    if section is None or isinstance(section, str | int | float | list):
        raise ValueError(f"the configuration has no section {where}{key}; it has {_keys(node)}")
    return section


def _get(node: Any, key: str) -> Any:
    return node.get(key) if isinstance(node, Mapping) else getattr(node, key, None)


def _keys(node: Any) -> list[str]:
    return [str(key) for key in (node if isinstance(node, Mapping) else vars(node))]


def _whole(name: str, value: Any, least: int, more: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of {least} or more{more}")
