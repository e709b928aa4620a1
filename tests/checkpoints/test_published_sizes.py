"""The models at their published sizes have the published weights' names and shapes; nothing is computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ipvla.models.backbones import Pi0BackboneConfig, SmolVLABackboneConfig
from ipvla.models.heads import Pi0HeadConfig
from ray_jobs.importing import pi, smolvla

HERE = Path(__file__).parent
#: SmolVLA's expert: three quarters of the language model's width.
SMOLVLA = Pi0HeadConfig(variant="smolvla", width=720, layers=16, mlp=2048, heads=15, key_heads=5, head_size=64)


def published(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes; a name with `{i}` is that of several layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, entry in json.loads((HERE / "pi" / "shapes" / f"{model}.json").read_text())["names"].items():
        first, last = entry.get("layers", (0, 0))
        others = dict(entry.get("other_shapes", ()))
        for i in range(first, last + 1):
            name = pattern.replace("{i}", str(i)).removeprefix("model.")
            shapes[name] = tuple(others.get(i, entry["shape"]))
    return shapes


@pytest.mark.parametrize("name", ["pi0", "pi05", "pi0_fast", "smolvla"])
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    backbone_config: Any
    if name == "smolvla":
        backbone_config, head_config = SmolVLABackboneConfig(str(HERE / "smolvla" / "tokenizer")), SMOLVLA
    else:
        backbone_config = Pi0BackboneConfig(str(HERE / "pi" / "tokenizer"))
        head_config = None if name == "pi0_fast" else Pi0HeadConfig(variant=name)  # type: ignore[arg-type]
    with torch.device("meta"):
        backbone = backbone_config.build(6, 3, 0)
        weights = head_config.build(backbone, 6, 50, 6).state_dict() if head_config else {}  # pi0-FAST's has none
    state = {f"backbone.{n}": x for n, x in backbone.state_dict().items()}
    state |= {f"head.{n}": x for n, x in weights.items()}
    renamed = smolvla.published if name == "smolvla" else pi.published
    own = {there: tuple(x.shape) for n, x in state.items() if (there := renamed(n)) is not None}
    theirs = published(name)
    theirs.pop(f"{pi.EXPERT}lm_head.weight", None)  # never used
    assert own.pop(pi.WORDS, None) is not None or name == "smolvla", "stored as lm_head alone"
    assert own == theirs
