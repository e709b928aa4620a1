"""Every mechanism on every family of backbones: acting equals training, a batch its rows, and memory matters."""

import pytest
import torch

from ipvla.models.backbones import Backbone
from ipvla.models.memory import (
    BankMemoryConfig,
    ChainMemoryConfig,
    GRUMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    LSTMMemoryConfig,
    MemoryConfig,
    PromptMemoryConfig,
    SkillMemoryConfig,
    WindowMemoryConfig,
)
from tests.models.memory.episodes import equal
from tests.models.memory.test_feeding_the_backbone import build, cut, play, rows, window

BANK = BankMemoryConfig(length=3, tokens=2, token_width=4, attention=5, hidden=16)
MECHANISMS: dict[str, MemoryConfig] = {
    "gru": GRUMemoryConfig(hidden=5, tokens=2, token_width=3),
    "lstm": LSTMMemoryConfig(hidden=5),
    "bank": BANK,
    "window": WindowMemoryConfig(length=7, tokens=2, token_width=3, attention=4, heads=2),
    "skill": SkillMemoryConfig(slots=6, top_k=2, key=5),
    "kv": KVMemoryConfig(length=3),
    "latent": LatentMemoryConfig(tokens=2),
    "prompt": PromptMemoryConfig(plan_tokens=6),
    "chain": ChainMemoryConfig([LatentMemoryConfig(tokens=2), BANK]),
}


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest) -> MemoryConfig:
    return MECHANISMS[request.param]


def test_it_acts_as_it_was_trained_and_remembers(backbone: Backbone, mechanism: MemoryConfig) -> None:
    module, batch = build(mechanism, backbone), window(backbone, 2, 3)
    batch.plan[..., 0] = backbone.tokenize_text("red")[0]  # a word that each knows
    seen, memory = play(module, backbone, batch)
    for row in range(2):
        alone, alone_memory = play(module, backbone, cut(batch, (slice(row, row + 1), slice(None))))
        for k in range(3):
            torch.testing.assert_close(seen[k].cognition[row], alone[k].cognition[0], rtol=1e-4, atol=1e-4)
        assert equal(rows(memory, row), alone_memory, atol=1e-4)
    features, _, own_loss = module.window(backbone, batch, module.initial(2))
    if not isinstance(mechanism, PromptMemoryConfig):  # training shows it the recorded plan
        stepped = torch.stack([one.cognition for one in seen], 1)
        torch.testing.assert_close(features.cognition, stepped, rtol=1e-3, atol=1e-4)
        last = cut(batch, (slice(None), slice(2, 3)))
        assert not torch.allclose(play(module, backbone, last)[0][0].cognition, seen[2].cognition, atol=1e-5)
    (features.cognition[:, -1].square().sum() + (0 if own_loss is None else own_loss)).backward()
    unreached = [name for name, x in module.named_parameters() if x.grad is None or not x.grad.any()]
    assert not unreached
