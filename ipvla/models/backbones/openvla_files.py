"""A directory in OpenVLA's published layout, read without remote code and without pickle.

`config.json`, `tokenizer.json`, `preprocessor_config.json` and safetensors (arXiv 2406.09246, in the layout of
Hugging Face); OpenVLA-OFT adds `.pt` files of tensors (arXiv 2502.19645). Shards are mapped, not copied.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ipvla.files import foreign_file, nearby, one_line, read_record
from ipvla.models.backbones.prismatic_vision import TOWERS, TowerConfig

#: Text that stands for an action: the last 256 ids before the padding, and the space before them.
ACTION_TOKENS: Final = 256
SPACE: Final = 29871
#: The files beside the weights: with them a backbone of this family can be built.
DESCRIPTION: Final = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "towers.json",
)
_VISION: Final = {"dinosiglip-vit-so-224px": 2, "siglip-vit-so400m": 1}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class OpenVLAFiles:
    """What `config.json` and `preprocessor_config.json` say.

    Attributes:
        directory: theirs.
        config: `config.json`.
        towers: one or two.
        image_size: side of a picture in pixels.
        processor: `preprocessor_config.json`, empty where there is none.
    """

    directory: Path
    config: Mapping[str, Any]
    towers: tuple[TowerConfig, ...]
    image_size: int
    processor: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """ValueError, in one line, for another family's directory, or one of which too little is known here."""
        config = read_json(directory / "config.json")
        family = config.get("model_type")
        if family != "openvla":
            raise ValueError(
                f"{directory} holds a checkpoint of model_type {family!r}, not 'openvla'; give a directory in "
                "OpenVLA's Hugging Face layout"
            )
        vision, text = config.get("vision_backbone_id"), config.get("text_config", {})
        if vision not in _VISION or text.get("model_type") != "llama":
            raise ValueError(
                f"{directory} has vision_backbone_id {vision!r} and a language model {text.get('model_type')!r}; "
                f"known are {' and '.join(_VISION)}, with 'llama'"
            )
        names = config["timm_model_ids"]
        known = dict(TOWERS)
        if (own := directory / "towers.json").exists():
            known |= {name: TowerConfig.from_timm(values) for name, values in read_json(own).items()}
        if len(names) != _VISION[vision] or not known.keys() >= set(names):
            raise ValueError(
                f"{directory}: the vision towers {names} are not those of {vision!r} ({', '.join(TOWERS)}); "
                "describe others in towers.json beside config.json"
            )
        sizes = set(config["image_sizes"])
        processor = directory / "preprocessor_config.json"
        given = read_json(processor) if processor.exists() else {}
        shown = {side for shape in given.get("input_sizes", []) for side in shape[1:]} or sizes
        if len(sizes) != 1 or shown != sizes:
            raise ValueError(
                f"{processor} makes pictures of {sorted(shown)} pixels, and the towers take {sorted(sizes)}; "
                "use the processor that was saved with the model"
            )
        return cls(directory, config, tuple(known[name] for name in names), sizes.pop(), given)

    @property
    def text(self) -> dict[str, Any]:
        """Settings of the language model; what the file leaves out is the default of transformers' LlamaConfig."""
        leave_out = ("model_type", "torch_dtype", "dtype")
        return {name: value for name, value in self.config["text_config"].items() if name not in leave_out}

    @property
    def end_of_words(self) -> int:
        """The id behind the last of the tokenizer's own: actions are the 256 ids before it."""
        return int(self.config["text_config"]["vocab_size"]) - int(self.config["pad_to_multiple_of"])

    def tokenizer(self) -> Tokenizer:
        """ValueError if there is none, or one without the tokens that stand for actions."""
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; save the tokenizer as a fast one (tokenizer.json) beside the model"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            reason = foreign_file(path) or one_line(error)
            raise ValueError(f"{path} is damaged ({reason}); copy or download it again") from None
        actions = range(self.end_of_words - ACTION_TOKENS, self.end_of_words)
        if any(tokenizer.id_to_token(i) is None for i in actions) or tokenizer.id_to_token(SPACE) != "\u2581":
            raise ValueError(
                f"{path} has no tokens {actions[0]} to {actions[-1]}, which stand for actions, or its {SPACE} is "
                "no space; use the tokenizer that was saved with the model"
            )
        return tokenizer

    def description(self) -> dict[str, bytes]:
        """The files beside the weights, by name."""
        paths = [self.directory / name for name in DESCRIPTION]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}

    @property
    def has_weights(self) -> bool:
        """Are there safetensors beside the description?"""
        return any((self.directory / name).is_file() for name in (_INDEX, _SINGLE))

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors by name, mapped. ValueError names a shard that is missing or damaged."""
        index, single = self.directory / _INDEX, self.directory / _SINGLE
        if index.is_file():
            shards = sorted({self.directory / name for name in read_json(index)["weight_map"].values()})
        elif single.is_file():
            shards = [single]
        else:
            others = sorted(path.name for path in self.directory.glob("*.bin"))
            hint = f" ({others[0]} is a pickle, which is not opened)" if others else ""
            raise ValueError(
                f"{self.directory} holds neither {_INDEX} nor {_SINGLE}{hint}; save it as safetensors"
            )
        return {name: tensor for shard in shards for name, tensor in mapped(shard).items()}


def mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. ValueError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = foreign_file(path) or one_line(error)
        raise ValueError(f"{path} is missing or damaged ({reason}); copy or download it again") from None


def pickled_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt` file, without `module.`, which DistributedDataParallel puts before their names.

    Raises:
        ValueError: it holds anything but tensors: nothing else is unpickled.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as a file of tensors ({str(error).splitlines()[0]:.100}); nothing else is "
            "unpickled"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(x, torch.Tensor) for x in content.values()):
        raise ValueError(f"{path} holds more than tensors by name; give the state dict alone")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def require_same(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], where: str) -> None:
    """ValueError that names the first weight that is missing, unknown, or of another shape."""
    for what, names in (("lacks", own.keys() - given.keys()), ("has the unknown", given.keys() - own.keys())):
        if names:
            raise ValueError(f"{where} {what} weight {min(names)} ({len(names)} in all); it is of another model")
    if wrong := sorted(name for name in own if own[name].shape != given[name].shape):
        name = wrong[0]
        raise ValueError(
            f"{where} has {name} of shape {tuple(given[name].shape)}, the model's is {tuple(own[name].shape)} "
            f"({len(wrong)} differ); it is of another model"
        )


def merge_adapter(weights: dict[str, torch.Tensor], directory: Path) -> int:
    """Adds a LoRA adapter of PEFT to the weights, in place; the number of modules that it changes.

    Raises:
        ValueError: it is of another base, or of another kind.
    """
    config = read_json(directory / "adapter_config.json")
    plain = config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("rank_pattern")
    if not plain or config.get("use_rslora") or config.get("bias", "none") != "none":
        raise ValueError(
            f"{directory} is no plain LoRA adapter of PEFT; merge it with PEFT, and import the result"
        )
    given = mapped(directory / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in given.items()}
    return merge_factors(weights, named, config["lora_alpha"] / config["r"], str(directory))


def merge_factors(
    weights: dict[str, torch.Tensor], factors: Mapping[str, torch.Tensor], scale: float, where: str
) -> int:
    """Weight += scale * B A for each `NAME.lora_A[.default].weight` and its B; the number of modules.

    Linear: A [r, in], B [out, r]; convolution: A [r, in, k, k], B [out, r, 1, 1].
    """
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in factors.items():
        module, found, side = name.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
        if found:
            pairs.setdefault(module, {})[side] = tensor
    if not pairs:
        raise ValueError(f"{where} holds no LoRA factors; give an adapter, or none")
    for module, pair in sorted(pairs.items()):
        own = weights.get(f"{module}.weight")
        a, b = pair.get("A"), pair.get("B")
        if own is None or a is None or b is None or (b.shape[0], *a.shape[1:]) != tuple(own.shape):
            shape = "absent" if own is None else tuple(own.shape)
            raise ValueError(
                f"{where} adapts {module}, whose weight is {shape} here; it is an adapter of another base: import "
                "it together with the one that it was trained on"
            )
        change = (b.float().flatten(1) @ a.float().flatten(1)).view_as(own) * scale
        weights[f"{module}.weight"] = (own.float() + change).to(own.dtype)
    return len(pairs)


def film_vision(path: Path, lora_alpha: float | None) -> dict[str, torch.Tensor]:
    """OFT's vision backbone with FiLM under this program's names, its LoRA merged.

    Args:
        lora_alpha: of its LoRA; None for OFT's own, min(r, 16).
    """
    given = {name.removeprefix("vision_backbone."): tensor for name, tensor in pickled_tensors(path).items()}
    given = {name.replace(".block.", ".") if ".blocks." in name else name: x for name, x in given.items()}
    plain = {n.replace(".base_layer.", "."): tensor for n, tensor in given.items() if ".lora_" not in n}
    factors = {name: tensor for name, tensor in given.items() if ".lora_" in name}
    if factors:
        rank = min(next(tensor for name, tensor in factors.items() if ".lora_A" in name).shape[:1])
        merge_factors(plain, factors, (lora_alpha or min(rank, 16)) / rank, str(path))
    return {f"vision_backbone.{name}": tensor for name, tensor in plain.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's table. ValueError if there is none."""
    try:
        return read_record(path)
    except (OSError, ValueError) as error:
        found = None if path.exists() else nearby(path.parent, path.name)
        remedy = f"did you mean {found}?" if found else "give a directory that holds it"
        if not path.exists() and (path.parent / "adapter_config.json").is_file():
            remedy = "there is an adapter of PEFT: give its base as --source, and this directory as --adapter"
        raise ValueError(f"{path} cannot be read ({one_line(error)}); {remedy}") from None
