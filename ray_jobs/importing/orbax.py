"""openpi's JAX checkpoints, which orbax writes: `params/` of pi0, pi0-FAST and pi0.5, read without JAX.

Arrays are zarr's in an OCDBT store, read by tensorstore; nothing is unpickled. Layers are stacked on axis 0, the
expert's names end in `_1`. JAX's kernels are [in, out], those of attention have an axis of heads:

    q [N, D, h], k and v [2, K, D, h], o [N, h, D]; gate and up [2, D, M], down [M, D]
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ipvla.models.backbones.hugging_face import DTYPES
from ipvla.models.backbones.openvla_files import read_json
from ipvla.policy import Policy
from ray_jobs.importing.pi import (
    EXPERT,
    PALIGEMMA,
    Added,
    PiConfig,
    PublishedWeights,
    openpi_policy,
    openpi_statistics,
)
from ray_jobs.importing.pi0_fast import openpi_fast_policy

logger = logging.getLogger(__name__)

_DESCRIBED: Final = "_METADATA"
_VISION: Final = f"{PALIGEMMA}model.vision_tower.vision_model."
_LANGUAGE: Final = {"": f"{PALIGEMMA}model.language_model.", "_1": f"{EXPERT}model."}
#: Modules that are there once, and inside a layer of the vision tower.
_ONCE: Final = {
    "PaliGemma.img.embedding": f"{_VISION}embeddings.patch_embedding",
    "PaliGemma.img.Transformer.encoder_norm": f"{_VISION}post_layernorm",
    "PaliGemma.img.head": f"{PALIGEMMA}model.multi_modal_projector.linear",
}
_BLOCK: Final = {
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MlpBlock_0.Dense_0": "mlp.fc1",
    "MlpBlock_0.Dense_1": "mlp.fc2",
    **{
        f"MultiHeadDotProductAttention_0.{name}": f"self_attn.{short}_proj"
        for name, short in {"query": "q", "key": "k", "value": "v", "out": "out"}.items()
    },
}
_NORMS: Final = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}


def is_orbax(directory: Path) -> bool:
    """Is it a step of an openpi training, or the `params` inside it?"""
    return any((directory / inside / _DESCRIBED).is_file() for inside in ("params", "."))


def from_orbax(directory: Path, settings: PiConfig, added: Added, statistics: Path | None = None) -> Policy:
    """A checkpoint of openpi's JAX trainer, such as gs://openpi-assets/checkpoints/pi0_fast_libero.

    Args:
        statistics: `norm_stats.json`; None for the only one below `assets/`.

    Raises:
        ValueError: in one line, for another checkpoint, or if something is missing.
    """
    chunk = settings.chunk
    if chunk is None:
        raise ValueError(
            f"{directory} does not say how many actions an answer has; set --pi.chunk to the action_horizon of "
            "its training, which is 50 for pi0_base and 10 for pi05_libero and pi0_fast_libero"
        )
    params = directory / "params" if (directory / "params" / _DESCRIBED).is_file() else directory
    weights = PublishedWeights(dict(_published(_arrays(params), DTYPES[added.dtype])), str(params))
    if "time_mlp_in.weight" not in weights.tensors and not settings.relative_actions:
        logger.warning(
            "openpi trained pi0_libero and pi0_fast_libero on actions relative to the state, which no file tells; "
            'for these set --pi.relative_actions "[true, true, true, true, true, true]"'
        )
    make = openpi_policy if "action_in_proj.weight" in weights.tensors else openpi_fast_policy
    return make(weights, openpi_statistics(directory, statistics), chunk, settings, added)


def _arrays(params: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names, without what JAX and orbax put around them, and arrays, one at a time."""
    described = read_json(params / _DESCRIBED)
    if described.get("use_zarr3") or not described.get("use_ocdbt"):
        raise ValueError(
            f"{params} is not in orbax's usual form (OCDBT with zarr 2); save it again without use_zarr3"
        )
    try:
        tensorstore = importlib.import_module("tensorstore")
    except ImportError:
        raise ValueError(
            f"{params} is read with tensorstore, which is not installed; run pip install -r requirements-orbax.txt"
        ) from None
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params.resolve()}/"}}
    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
        names = sorted(key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray"))
        if wrong := [name for name in names if "lora" in name]:
            raise ValueError(f"has the LoRA weight {wrong[0]} of openpi, which is not merged here")
        for name in names:
            spec = {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}
            array = tensorstore.open(spec, open=True).result().read().result()
            yield name.removeprefix("params.").removesuffix(".value"), _tensor(array)
    except ValueError as error:  # tensorstore's own are of several lines
        raise ValueError(f"{params} cannot be read: {str(error).splitlines()[0]:.200}") from None


def _tensor(array: Any) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # numpy has none of its own
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _published(
    arrays: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under their published names, the backbone's in its dtype."""
    for name, array in arrays:
        for there, x in _renamed(name, array):
            yield there, (x.to(dtype) if there.startswith(PALIGEMMA) else x.float()).contiguous()


def _renamed(name: str, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    module, _, kind = name.rpartition(".")
    if name == "PaliGemma.llm.embedder.input_embedding":
        yield f"{PALIGEMMA}lm_head.weight", x
    elif name == "PaliGemma.img.pos_embedding":
        yield f"{_VISION}embeddings.position_embedding.weight", x[0]
    elif name == "PaliGemma.img.embedding.kernel":
        yield f"{_ONCE[module]}.weight", x.permute(3, 2, 0, 1)
    elif module in _ONCE or not name.startswith("PaliGemma."):
        yield from _dense(_ONCE.get(module, module), kind, x)
    elif found := re.fullmatch(r"PaliGemma\.img\.Transformer\.encoderblock\.(.+)\.(\w+)", name):
        for i, layer in enumerate(x):
            yield from _dense(f"{_VISION}encoder.layers.{i}.{_BLOCK.get(found[1], found[1])}", found[2], layer)
    elif found := re.fullmatch(r"PaliGemma\.llm\.final_norm(_1|)\.(.+)", name):
        yield from _norm(f"{_LANGUAGE[found[1]]}norm", found[2], x)
    elif found := re.fullmatch(r"PaliGemma\.llm\.layers\.(?:attn\.|)(\w+?)(_1|)(\.\w+\.\w+|\.\w+|)", name):
        for i, layer in enumerate(x):
            yield from _language(f"{_LANGUAGE[found[2]]}layers.{i}.", found[1], found[3].removeprefix("."), layer)
    else:
        yield name, x


def _language(layer: str, part: str, inside: str, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Of one layer of a language model or an expert."""
    if part in _NORMS:
        yield from _norm(f"{layer}{_NORMS[part]}", inside, x)
        return
    named: Mapping[str, torch.Tensor]
    match part, inside:
        case "q_einsum", "w":
            named = {"self_attn.q_proj": x.transpose(1, 2).flatten(0, 1)}
        case "kv_einsum", "w":
            k, v = x.transpose(2, 3).flatten(1, 2)
            named = {"self_attn.k_proj": k, "self_attn.v_proj": v}
        case "attn_vec_einsum", "w":
            named = {"self_attn.o_proj": x.flatten(0, 1).T}
        case "mlp", "gating_einsum":
            named = {"mlp.gate_proj": x[0].T, "mlp.up_proj": x[1].T}
        case "mlp", "linear":
            named = {"mlp.down_proj": x.T}
        case _:
            named = {f"{part}.{inside}": x}
    for name, weight in named.items():
        yield f"{layer}{name}.weight", weight


def _norm(there: str, inside: str, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A plain norm, or one with `Dense_0`, which the time scales, shifts and gates."""
    module, _, kind = inside.rpartition(".")
    yield from _dense(f"{there}.dense" if module == "Dense_0" else there, kind, x)


def _dense(there: str, kind: str, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """`kernel` and `bias` of a dense layer, whose kernel may have an axis of heads; `scale` of a norm."""
    if kind == "kernel":
        yield f"{there}.weight", (x.flatten(0, -2) if there.endswith("out_proj") else x.flatten(1)).T
    else:
        yield f"{there}.{'weight' if kind == 'scale' else kind}", x.flatten()
