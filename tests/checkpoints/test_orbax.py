"""openpi's JAX checkpoints: pi0-FAST as openpi 15a9616 wrote and ran it; pi0, pi0.5 by names, shapes and inverse.

The weights of the tiny pi0-FAST are those of `pi/pi0_fast`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ipvla.models.backbones.protocol import padded
from ipvla.models.features import Features
from ipvla.models.heads.pi0_fast import Pi0FastHead
from ipvla.policy import Policy
from ipvla.types import ModelInputs
from ray_jobs.import_policy import ImportConfig, imported, main
from ray_jobs.importing import pi
from ray_jobs.importing.orbax import _renamed, from_orbax
from ray_jobs.importing.pi import Added, PiConfig, from_lerobot
from tests.checkpoints.test_pi import close
from tests.checkpoints.test_published_sizes import published

tensorstore = pytest.importorskip("tensorstore", reason="run pip install -r requirements-orbax.txt")

HERE = Path(__file__).parent / "pi"
SOURCE = HERE / "openpi_pi0_fast"
SETTINGS = PiConfig(
    str(HERE / "tokenizer"), vision_heads=3, chunk=10, action_tokenizer=str(HERE / "fast_tokenizer")
)
ADDED = Added("float32", ("base", "wrist"))


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(SOURCE / "golden.safetensors")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return from_orbax(SOURCE, SETTINGS, ADDED)


@pytest.fixture(scope="module")
def head(policy: Policy) -> Pi0FastHead:
    assert isinstance(policy.model.head, Pi0FastHead)
    return policy.model.head


@pytest.fixture(scope="module")
def features(policy: Policy, golden: dict[str, torch.Tensor]) -> Features:
    """Of openpi's prompts; the third camera is missing, and seen as black."""
    backbone, given = policy.model.backbone, load_file(HERE / "pi0_fast" / "golden.safetensors")
    pictures = [given[f"raw.observation.images.{name}_rgb"] for name in ("base_0", "left_wrist_0")]
    images = torch.stack([picture.permute(0, 2, 3, 1) for picture in pictures], 1)
    before = backbone.frame.before[:-1]
    rows = [[*before, *ids[mask].tolist()] for ids, mask in zip(*prompts(golden), strict=True)]
    ids = padded(rows)
    with torch.no_grad():
        seen = backbone(ModelInputs(images, torch.zeros(2, 8), ids.clamp(min=0), ids >= 0)).features
    return replace(seen, language=backbone)


def prompts(golden: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return golden["prompt.tokens"], golden["prompt.mask"]


def test_every_tensor_is_the_one_that_lerobots_layout_has(policy: Policy) -> None:
    state, theirs = policy.model.state_dict(), load_file(HERE / "pi0_fast" / "model.safetensors")
    ours = {there: x for name, x in state.items() if (there := pi.published(name)) not in (None, pi.WORDS)}
    assert ours.keys() == {name.removeprefix("model.") for name in theirs}
    assert all(torch.equal(ours[name.removeprefix("model.")], x) for name, x in theirs.items())


def test_prompts_are_openpis(policy: Policy, golden: dict[str, torch.Tensor]) -> None:
    texts = ["pick up the black bowl next to the plate and place it on the plate", "pick up the wine bottle"]
    bins = [[-1, 18, 62, 106, 149, 193, 237, 255], [118, 178, 188, 56, 236, 70, 105, 206]]
    for text, row, ids, mask in zip(texts, bins, *prompts(golden), strict=True):
        state = (np.array(row, np.float32) + 0.5) / 128 - 1
        assert policy.model.backbone.tokenize_with_state(text, state)[3 * 16 :] == ids[mask].tolist()
    shouted = policy.model.backbone.config.text("  Open_the TOP\ndrawer ", np.zeros(1, np.float32))
    assert shouted == "Task: open the top\ndrawer, State: 128;\n"


def test_logits_and_losses_are_openpis(
    head: Pi0FastHead, features: Features, golden: dict[str, torch.Tensor]
) -> None:
    said = padded([ids[mask].tolist() for ids, mask in zip(golden["tokens"], golden["loss_mask"], strict=True)])
    logits = head.logits(features, said)
    for i, theirs in enumerate(golden["loss_per_sample"]):
        ours = golden[f"logits_of_loss_positions.{i}"]
        close(logits[i, : len(ours)], ours)
        assert F.cross_entropy(logits[i], said[i], ignore_index=-1).item() == pytest.approx(
            theirs.item(), abs=1e-4
        )


def test_what_it_writes_freely_is_openpis(
    policy: Policy, features: Features, golden: dict[str, torch.Tensor]
) -> None:
    """The first token behind the prompt leaves one position free."""
    config = replace(policy.config.head, constrained=False, max_tokens=16)  # type: ignore[call-arg]
    free = config.build(policy.model.backbone, 8, 10, 7)
    assert isinstance(free, Pi0FastHead)
    assert free.write(features).tolist() == golden["greedy"].tolist()
    near = replace(config, gap=0).build(policy.model.backbone, 8, 10, 7)  # type: ignore[call-arg]
    assert isinstance(near, Pi0FastHead)
    assert near.write(features).tolist() != golden["greedy"].tolist()


def test_it_is_imported_and_acts(tmp_path: Path) -> None:
    main(ImportConfig(SOURCE, tmp_path / "policy", dtype="float32", cameras=("base", "", "wrist"), pi=SETTINGS))
    policy = Policy.load(tmp_path / "policy").require_finite()
    assert policy.transforms.cameras == ("base", "wrist")
    assert policy.config.backbone.black_views == (1,)  # type: ignore[attr-defined]
    assert policy.transforms.conventions.normalisation == "quantiles"
    inside = imported(
        ImportConfig(
            SOURCE / "params", tmp_path / "p", dtype="float32", pi=SETTINGS,
            statistics=next(SOURCE.glob("assets/**/norm_stats.json")),
        )
    )  # fmt: skip
    weights = policy.model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in inside.model.state_dict().items())


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_names_and_shapes_become_the_published_ones(variant: str) -> None:
    """At the published sizes; nothing is computed."""
    shapes = json.loads((HERE / "shapes" / f"openpi_{variant}.json").read_text())["shapes"]
    ours = {}
    for name, shape in shapes.items():
        for there, x in _renamed(name.replace("/", "."), torch.empty(shape, device="meta")):
            ours[there] = tuple(x.shape)
    theirs = published(variant)
    theirs.pop(f"{pi.EXPERT}lm_head.weight")  # never used
    assert ours == theirs


def in_openpis_form(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """LeRobot's weights as openpi's arrays, each by the einsum in which openpi uses it."""
    yield from tower(weights)
    yield from language(weights, f"{pi.PALIGEMMA}model.language_model.", "", 32, 64)
    yield from language(weights, f"{pi.EXPERT}model.", "_1", 24, 48)
    for name, x in weights.items():
        if name.endswith("bias") and not name.startswith("paligemma_with_expert."):
            yield name, x
        elif not name.startswith("paligemma_with_expert."):
            yield name.replace(".weight", ".kernel"), x.T


def stack(
    weights: dict[str, torch.Tensor], name: str, count: int, shape: tuple[int, ...], transposed: bool = True
) -> torch.Tensor:
    rows = [weights[name.replace("#", str(i))] for i in range(count)]
    return torch.stack([(row.T if transposed else row).reshape(shape) for row in rows])


def tower(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    img, vision, stacked = (
        "PaliGemma.img.",
        f"{pi.PALIGEMMA}model.vision_tower.vision_model.",
        partial(stack, weights),
    )
    patches = weights[f"{vision}embeddings.patch_embedding.weight"]
    yield f"{img}embedding.kernel", patches.permute(2, 3, 1, 0)
    yield f"{img}embedding.bias", weights[f"{vision}embeddings.patch_embedding.bias"]
    yield f"{img}pos_embedding", weights[f"{vision}embeddings.position_embedding.weight"][None]
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        yield f"{img}Transformer.encoder_norm.{ours}", weights[f"{vision}post_layernorm.{theirs}"]
    yield f"{img}head.kernel", weights[f"{pi.PALIGEMMA}model.multi_modal_projector.linear.weight"].T
    yield f"{img}head.bias", weights[f"{pi.PALIGEMMA}model.multi_modal_projector.linear.bias"]
    block, layer = f"{img}Transformer.encoderblock.", f"{vision}encoder.layers.#."
    for i in (0, 1):
        yield f"{block}LayerNorm_{i}.scale", stacked(f"{layer}layer_norm{i + 1}.weight", 2, (24,), False)
        yield f"{block}LayerNorm_{i}.bias", stacked(f"{layer}layer_norm{i + 1}.bias", 2, (24,), False)
        sizes = (24, 40) if i == 0 else (40, 24)
        yield f"{block}MlpBlock_0.Dense_{i}.kernel", stacked(f"{layer}mlp.fc{i + 1}.weight", 2, sizes)
        yield f"{block}MlpBlock_0.Dense_{i}.bias", stacked(f"{layer}mlp.fc{i + 1}.bias", 2, sizes[1:], False)
    for long, short in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        out = short == "out"
        kernel, bias = ((3, 8, 24), (24,)) if out else ((24, 3, 8), (3, 8))
        attention = f"{block}MultiHeadDotProductAttention_0.{long}."
        yield f"{attention}kernel", stacked(f"{layer}self_attn.{short}_proj.weight", 2, kernel)
        yield f"{attention}bias", stacked(f"{layer}self_attn.{short}_proj.bias", 2, bias, False)
    yield "PaliGemma.llm.embedder.input_embedding", weights[f"{pi.PALIGEMMA}lm_head.weight"]


def language(
    weights: dict[str, torch.Tensor], prefix: str, suffix: str, width: int, mlp: int
) -> Iterator[tuple[str, torch.Tensor]]:
    stacked = partial(stack, weights)
    own = f"{prefix}layers.#."
    attn, inner = "PaliGemma.llm.layers.attn.", f"PaliGemma.llm.layers.mlp{suffix}."
    heads = [stacked(f"{own}self_attn.{n}_proj.weight", 3, (width, -1, 8)) for n in ("q", "k", "v")]
    q, k, v = (x.transpose(1, 2) for x in heads)  # BTD,NDH->BTNH
    yield f"{attn}q_einsum{suffix}.w", q
    yield f"{attn}kv_einsum{suffix}.w", torch.stack([k, v], 1)
    yield f"{attn}attn_vec_einsum{suffix}.w", stacked(f"{own}self_attn.o_proj.weight", 3, (8, 8, width))
    gates = [stacked(f"{own}mlp.{n}_proj.weight", 3, (width, mlp)) for n in ("gate", "up")]
    yield f"{inner}gating_einsum", torch.stack(gates, 1)
    yield f"{inner}linear", stacked(f"{own}mlp.down_proj.weight", 3, (mlp, width))
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    timed = suffix and f"{prefix}norm.dense.weight" in weights
    for theirs, ours in norms.items():
        module = f"PaliGemma.llm.layers.{theirs}{suffix}."
        if timed:
            yield f"{module}Dense_0.kernel", stacked(f"{own}{ours}.dense.weight", 3, (24, 72))
            yield f"{module}Dense_0.bias", stacked(f"{own}{ours}.dense.bias", 3, (72,), False)
        else:
            yield f"{module}scale", stacked(f"{own}{ours}.weight", 3, (width,), False)
    if timed:
        yield f"PaliGemma.llm.final_norm{suffix}.Dense_0.kernel", weights[f"{prefix}norm.dense.weight"].T
        yield f"PaliGemma.llm.final_norm{suffix}.Dense_0.bias", weights[f"{prefix}norm.dense.bias"]
    else:
        yield f"PaliGemma.llm.final_norm{suffix}.scale", weights[f"{prefix}norm.weight"]


def written(params: Path, arrays: Iterator[tuple[str, torch.Tensor]]) -> None:
    """As orbax writes them."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params}/"}}
    for name, x in arrays:
        spec = {"driver": "zarr", "kvstore": {**store, "path": f"params.{name}.value/"}}
        tensorstore.open(spec, create=True, shape=x.shape, dtype=tensorstore.float32).result()[...] = x.numpy()
    (params / "_METADATA").write_text(json.dumps({"use_ocdbt": True, "use_zarr3": False}))


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_pi0_and_pi05_are_those_of_lerobots_layout(tmp_path: Path, variant: str) -> None:
    shutil.copytree(SOURCE / "assets", tmp_path / "assets")
    given = load_file(HERE / variant / "model.safetensors")
    written(tmp_path / "params", in_openpis_form({name.removeprefix("model."): x for name, x in given.items()}))
    ours = from_orbax(tmp_path, SETTINGS, ADDED)
    theirs = from_lerobot(HERE / variant, SETTINGS, ADDED).model.state_dict()
    assert ours.model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.model.state_dict().items())
    assert ours.config.chunk == 10
    assert ours.transforms.conventions.normalisation == {"pi0": "normal", "pi05": "quantiles"}[variant]


def test_what_is_missing_or_damaged_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, directory: Path = tmp_path / "step", settings: PiConfig = SETTINGS) -> None:
        with pytest.raises(ValueError, match=message) as error:
            from_orbax(directory, settings, ADDED)
        assert "\n" not in str(error.value)

    shutil.copytree(SOURCE, tmp_path / "step")
    refused(r"does not say how many actions .*; set --pi\.chunk", settings=replace(SETTINGS, chunk=None))
    refused("0 norm_stats.json below assets/; name the robot's with --statistics", tmp_path / "step" / "params")
    shard = max((tmp_path / "step" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused("params cannot be read: ")
    shard.write_bytes(content)
    described = tmp_path / "step" / "params" / "_METADATA"
    described.write_text(json.dumps({"use_ocdbt": True, "use_zarr3": True}))
    refused(r"is not in orbax's usual form \(OCDBT with zarr 2\)")
    described.write_text(json.dumps({"use_ocdbt": True}))
    written(tmp_path / "step" / "params", iter([("PaliGemma.llm.extra.w", torch.zeros(2))]))
    refused(r"has the unknown weight PaliGemma\.llm\.extra\.w \(1 in all\)")
    written(tmp_path / "step" / "params", iter([("PaliGemma.llm.layers.mlp.linear_lora_a", torch.zeros(3, 2))]))
    refused("has the LoRA weight params.PaliGemma.llm.layers.mlp.linear_lora_a.value of openpi")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    refused("not installed; run pip install -r requirements-orbax.txt")
