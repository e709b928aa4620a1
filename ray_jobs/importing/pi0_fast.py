"""pi0-FAST from LeRobot's layout, and from openpi's weights, as a policy of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ipvla.data.statistics import Statistics
from ipvla.models.action_tokens import FastTokensConfig
from ipvla.models.backbones import Pi0BackboneConfig
from ipvla.models.heads import Pi0FastHeadConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ray_jobs.importing.lerobot import LeRobotFiles
from ray_jobs.importing.pi import (
    Added,
    PiConfig,
    PublishedWeights,
    assembled,
    camera_names,
    imported_conventions,
    paligemma_sizes,
    published,
)

_OPENPI_CAMERAS: Final = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
_PUBLISHED_FAST: Final = "physical-intelligence/fast"
_PROMPT: Final = "Task: {instruction}, State: {state};\n"
#: The files of a FAST tokenizer; what lies beside them is code, which is not run.
_FAST: Final = ("tokenizer.json", "processor_config.json")


def from_lerobot_fast(directory: Path, settings: PiConfig, added: Added) -> Policy:
    """A policy of type pi0_fast.

    Raises:
        ValueError: in one line, for another policy, or files or weights that are missing.
    """
    files = LeRobotFiles.read(directory, ("pi0_fast",))
    config, weights, names = files.config, PublishedWeights.read(directory), camera_names(added, files.cameras)
    sizes = paligemma_sizes(weights, settings.vision_heads or 16)
    files.refuse(use_relative_actions=False, image_resolution=[sizes.image_size] * 2)
    backbone = Pi0BackboneConfig(
        sizes=sizes,
        pretrained=settings.tokenizer or Pi0BackboneConfig.pretrained,
        dtype=added.dtype,
        prompt=_PROMPT,
        cleaned=True,
        state_numbers=settings.state_numbers,
        closing=settings.bos == "prompt",
        max_prompt_tokens=sizes.image_tokens * len(names) + config["tokenizer_max_length"] + 1,
    )
    head = Pi0FastHeadConfig(
        fast_tokenizer(settings.action_tokenizer or config["action_tokenizer_name"]),
        begins=settings.bos == "behind",
        skip=config["fast_skip_tokens"],
        max_tokens=config["max_decoding_steps"],
        temperature=config["temperature"],
    )
    chunk = config["chunk_size"]
    return assembled(
        IPVLAConfig(backbone, added.memory, head, chunk=chunk),
        imported_conventions(files.statistics, files.normalisation, names, chunk, added.terms),
        settings.execute or config["n_action_steps"],
        weights.with_words(),
        published,
        files.beside_weights(),
    )


def openpi_fast_policy(
    weights: PublishedWeights, statistics: Statistics, chunk: int, settings: PiConfig, added: Added
) -> Policy:
    """As openpi serves it: a camera that is missing is seen as black."""
    names, sizes = camera_names(added, _OPENPI_CAMERAS), paligemma_sizes(weights, settings.vision_heads or 16)
    given = added.cameras or _OPENPI_CAMERAS
    black = tuple(i for i in range(len(_OPENPI_CAMERAS)) if not "".join(given[i : i + 1]))
    backbone = Pi0BackboneConfig(
        sizes=sizes,
        pretrained=settings.tokenizer or Pi0BackboneConfig.pretrained,
        dtype=added.dtype,
        prompt=_PROMPT,
        lowered=True,
        state_numbers=settings.state_numbers,
        black_views=black,
        max_prompt_tokens=sizes.image_tokens * len(_OPENPI_CAMERAS) + 250,
    )
    head = Pi0FastHeadConfig(fast_tokenizer(settings.action_tokenizer or _PUBLISHED_FAST), gap=1)
    return assembled(
        IPVLAConfig(backbone, added.memory, head, chunk=chunk),
        imported_conventions(statistics, "quantiles", names, chunk, added.terms, settings.relative_actions),
        settings.execute or max(1, chunk // 2),
        weights.with_words(),
        published,
        {},
    )


def fast_tokenizer(name: str) -> FastTokensConfig:
    """Of a directory or a hub name. ValueError if there is none, or it is damaged."""
    directory = Path(name).expanduser()
    if not directory.is_dir():
        directory = _downloaded(name)
    config = FastTokensConfig(directory)
    config.build()
    return config


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FAST)))
    except Exception as error:  # of the hub, of the network, of a name that is none
        raise ValueError(
            f"the FAST tokenizer {name!r} is no directory, and could not be downloaded "
            f"({str(error).splitlines()[0]:.100}); give --pi.action_tokenizer a directory with "
            f"{' and '.join(_FAST)}"
        ) from None
