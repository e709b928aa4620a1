"""SmolVLA from LeRobot's layout, as a policy of this project."""

from __future__ import annotations

import math
from pathlib import Path

from ipvla.models.backbones import SmolVLABackboneConfig, SmolVLMSizes
from ipvla.models.heads import Pi0HeadConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ray_jobs.importing.lerobot import LeRobotFiles
from ray_jobs.importing.pi import Added, PiConfig, PublishedWeights, assembled, camera_names, imported_conventions

_VLM, _EXPERT = "vlm_with_expert.vlm.", "vlm_with_expert.lm_expert."


def from_lerobot_smolvla(directory: Path, settings: PiConfig, added: Added) -> Policy:
    """A policy of type smolvla.

    Raises:
        ValueError: in one line, for another policy, or files or weights that are missing.
    """
    files = LeRobotFiles.read(directory, ("smolvla",))
    files.refuse(
        attention_mode="cross_attn", num_expert_layers=0, prefix_length=0, add_image_special_tokens=False,
        adapt_to_pi_aloha=False, use_delta_joint_actions_aloha=False,
    )  # fmt: skip
    config, weights, names = files.config, PublishedWeights.read(directory), camera_names(added, files.cameras)
    sizes = _sizes(weights, settings.head_size, settings.vision_heads or 12)
    if list(config["resize_imgs_with_padding"]) != [sizes.image_size] * 2:
        raise ValueError(
            f"{directory} makes pictures of {config['resize_imgs_with_padding']} pixels, and the vision tower "
            f"takes {sizes.image_size}; set resize_imgs_with_padding to that, and train it so"
        )
    backbone = SmolVLABackboneConfig(
        sizes=sizes,
        state_size=config["max_state_dim"],
        pretrained=settings.tokenizer or SmolVLABackboneConfig.pretrained,
        dtype=added.dtype,
        max_prompt_tokens=sizes.image_tokens * len(names) + config["tokenizer_max_length"],
    )
    gate = weights.shape(f"{_EXPERT}layers.0.mlp.gate_proj.weight")
    head = Pi0HeadConfig(
        variant="smolvla", width=gate[1], layers=sizes.layers, mlp=gate[0], heads=sizes.heads,
        key_heads=sizes.key_heads, head_size=sizes.head_size, dims=config["max_action_dim"],
        self_attention_every=config["self_attn_every_n_layers"], steps=config["num_steps"], **files.times(),
    )  # fmt: skip
    chunk = config["chunk_size"]
    return assembled(
        IPVLAConfig(backbone, added.memory, head, chunk=chunk),
        imported_conventions(files.statistics, files.normalisation, names, chunk, added.terms),
        settings.execute or config["n_action_steps"],
        weights,
        published,
        files.beside_weights(),
    )


def published(name: str) -> str | None:
    """See `ray_jobs.importing.pi.assembled`."""
    part, _, inside = name.partition(".")
    if part == "backbone":
        return inside.replace("vlm.", _VLM, 1) if inside.startswith("vlm.") else inside
    if part != "head" or inside == "cognition_proj.weight":
        return None
    return inside.replace("expert.", _EXPERT, 1) if inside.startswith("expert.") else inside


def _sizes(weights: PublishedWeights, head_size: int, vision_heads: int) -> SmolVLMSizes:
    """From the shapes: the file of the language model's own sizes is not in a checkpoint."""
    text, vision = f"{_VLM}model.text_model", f"{_VLM}model.vision_model"
    vocabulary, width = weights.shape(f"{text}.embed_tokens.weight")
    patches = weights.shape(f"{vision}.embeddings.patch_embedding.weight")
    shuffled = weights.shape(f"{_VLM}model.connector.modality_projection.proj.weight")[1]
    return SmolVLMSizes(
        width=width,
        layers=weights.layers(f"{text}.layers."),
        mlp=weights.shape(f"{text}.layers.0.mlp.gate_proj.weight")[0],
        heads=weights.shape(f"{text}.layers.0.self_attn.q_proj.weight")[0] // head_size,
        key_heads=weights.shape(f"{text}.layers.0.self_attn.k_proj.weight")[0] // head_size,
        head_size=head_size,
        vocabulary=vocabulary,
        vision_width=patches[0],
        vision_layers=weights.layers(f"{vision}.encoder.layers."),
        vision_mlp=weights.shape(f"{vision}.encoder.layers.0.mlp.fc1.weight")[0],
        vision_heads=vision_heads,
        patch=patches[-1],
        image_size=math.isqrt(weights.shape(f"{vision}.embeddings.position_embedding.weight")[0]) * patches[-1],
        shuffle=math.isqrt(shuffled // patches[0]),
    )
