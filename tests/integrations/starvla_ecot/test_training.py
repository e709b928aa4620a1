"""A short training on the contract's batches, with the loss on words and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from integrations.starvla_ecot import make_dataloader_ecot, read_config
from integrations.starvla_ecot.lm_loss import LossScale, reasoning_loss
from ipvla.models.backbones.protocol import padded
from ipvla.models.backbones.tiny import TinyBackbone
from ipvla.models.backbones.tiny_vlm import TinyVLM, TinyVLMConfig
from ipvla.models.heads import RegressionConfig
from ipvla.types import NO_TOKEN, ModelInputs

Sample = dict[str, Any]


@pytest.mark.parametrize("vlm_cot", [0.0, 0.2])
def test_training_on_the_contracts_batches_lowers_its_losses(
    make_cfg: Callable[..., dict[str, Any]], vlm_cot: float
) -> None:
    """120 steps of two samples with the project's own network."""
    torch.manual_seed(0)
    cfg = make_cfg(
        **{
            "datasets.vla_data.image_size": [28, 28],
            "datasets.vla_data.per_device_batch_size": 2,
            "datasets.vla_data.ecot.scheduled_stage": 6,
            "framework.action_model.future_action_window_size": 7,
            "trainer.loss_scale.vlm_cot": vlm_cot,
        }
    )
    network = TinyVLM(
        TinyVLMConfig(
            image_size=28,
            num_views=2,
            proprio_dim=7,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=48,
            trunk_channels=8,
            max_text_tokens=256,
        )
    )
    backbone = TinyBackbone(network, max_prompt_tokens=64)
    head = RegressionConfig(hidden=32).build(backbone, 7, 8, 7)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    config, history = read_config(cfg), []
    scale = LossScale(config.vla_scale, config.vlm_cot_scale)
    for step, samples in enumerate(_endless(make_dataloader_ecot(cfg))):
        if step == 120:
            break
        inputs, actions = _inputs(backbone, samples), torch.stack([torch.from_numpy(s["action"]) for s in samples])
        loss = head.loss(backbone(inputs).features, actions, torch.ones_like(actions, dtype=torch.bool))
        reasoning = [sample["reasoning"] for sample in samples]
        total, told = scale.total(loss, partial(reasoning_loss, backbone, inputs, reasoning))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(told)
    assert _mean(history[-20:], "action_loss") < 0.7 * _mean(history[:20], "action_loss")
    if vlm_cot:
        assert _mean(history[-20:], "lm_loss") < 0.5 * _mean(history[:20], "lm_loss")
    else:
        assert not any("lm_loss" in told for told in history)


def _endless(loader: Any) -> Iterator[list[Sample]]:
    while True:
        yield from loader


def _inputs(backbone: TinyBackbone, samples: list[Sample]) -> ModelInputs:
    ids = padded([backbone.tokenize(sample["lang"]) for sample in samples])
    return ModelInputs(
        images=torch.from_numpy(np.stack([np.stack([np.asarray(i) for i in s["image"]]) for s in samples])),
        proprio=torch.from_numpy(np.concatenate([s["state"] for s in samples])),
        input_ids=ids.clamp(min=0),
        attention_mask=ids != NO_TOKEN,
    )


def _mean(history: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([float(told[name]) for told in history]))
