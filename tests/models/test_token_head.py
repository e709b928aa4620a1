"""The head `tokens`: the language model writes actions, on every backbone, from what the memory says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.models.action_tokens import ActionTokenError, FastTokensConfig, RVQTokensConfig
from ipvla.models.action_tokens.rvq import RVQPart, RVQSettings, RVQTokens
from ipvla.models.backbones import Backbone, TinyConfig
from ipvla.models.features import Features, Reads
from ipvla.models.heads import TokensConfig
from ipvla.models.heads.protocol import draw_noise
from ipvla.models.heads.tokens import TokensHead, held
from ipvla.types import NO_TOKEN
from tests.models.conftest import inputs_for
from tests.models.outside import WordsConfig

CHUNK, ACTIONS = 4, 3
FAST = FastTokensConfig(Path(__file__).with_name("action_tokens") / "golden" / "fast_published")
WORDS = ["press", "press the red button", "press the blue button"]
HEADS: dict[str, TokensConfig] = {
    "bins": TokensConfig(),
    "bins in parallel": TokensConfig(decoding="parallel"),
    "bins by last ids": TokensConfig(ids="last", skip=5),
    "fast": TokensConfig(FAST),
}


@pytest.fixture
def features(backbone: Backbone) -> Features:
    """Of three observations with prompts of different lengths."""
    backbone.reads = Reads(language=True).of(backbone.num_layers)
    return replace(backbone(inputs_for(backbone, WORDS)).features, language=backbone)


@pytest.fixture(scope="module")
def rvq(tmp_path_factory: pytest.TempPathFactory) -> TokensConfig:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("rvq")
    parts = (RVQPart((2,), 1), RVQPart((0, 1), 2))
    RVQTokens(RVQSettings(CHUNK, parts, codes=8, code_dim=3, latent=4, channels=2, levels=1)).save(directory)
    return TokensConfig(RVQTokensConfig(directory))


@pytest.fixture(params=[*HEADS, "rvq", "rvq in parallel"])
def config(request: pytest.FixtureRequest, rvq: TokensConfig) -> TokensConfig:
    return {**HEADS, "rvq": rvq, "rvq in parallel": replace(rvq, decoding="parallel")}[request.param]


def build(config: TokensConfig, backbone: Backbone) -> TokensHead:
    if config.ids == "last" and backbone.vocabulary < 300:
        pytest.skip("this backbone has fewer ids than action tokens")
    torch.manual_seed(0)
    return config.build(backbone, 5, CHUNK, ACTIONS).eval()


def rows(features: Features, which: slice) -> Features:
    return replace(features.map(lambda x: x[which]), language=features.language)


def chunks(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, CHUNK, ACTIONS, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_batch_is_written_as_its_rows_alone_are(
    config: TokensConfig, backbone: Backbone, features: Features
) -> None:
    for temperature in (0.0, 1.0):
        head = build(replace(config, temperature=temperature), backbone)
        noise = None if head.noise_shape is None else draw_noise([1, 2, 3], head.noise_shape)
        together = head.sample(features, noise)
        assert together.shape == (3, CHUNK, ACTIONS)
        assert together.abs().max() <= 1 or not config.bounded
        for i in range(3):
            row = slice(i, i + 1)
            alone = head.sample(rows(features, row), None if noise is None else noise[row])
            torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=1e-5)


def test_sampling_takes_its_randomness_from_the_noise_alone(backbone: Backbone, features: Features) -> None:
    head = build(TokensConfig(temperature=1.0), backbone)
    noise = draw_noise([1, 2, 3], head.noise_shape or ())
    assert torch.equal(head.sample(features, noise), head.sample(features, noise))
    assert not torch.equal(head.sample(features, noise), head.sample(features, -noise))


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_written_tokens_are_the_likeliest_under_the_loss(
    decoding: str, backbone: Backbone, features: Features
) -> None:
    """Rollout with cached keys computes what training computes in one pass."""
    head = build(TokensConfig(decoding=decoding), backbone)
    written = head.sample(features)
    weight = torch.ones_like(written, dtype=torch.bool)
    first = weight.clone()
    first[:, 1:] = False
    first[..., 1:] = False
    losses = [head.loss(features, written, weight)]
    for step in range(CHUNK):
        other = written.clone()
        other[:, step] = -other[:, step]
        losses.append(head.loss(features, other, weight))
    assert min(losses) == losses[0]


def test_gradient_reaches_every_parameter_and_the_keys_that_memory_may_change(
    config: TokensConfig, backbone: Backbone
) -> None:
    head = build(config, backbone).train()
    backbone.reads = Reads(language=True).of(backbone.num_layers)
    features = replace(backbone(inputs_for(backbone, WORDS)).features, language=backbone)
    features.cognition.retain_grad()
    head.loss(features, chunks(), torch.ones(3, CHUNK, ACTIONS, dtype=torch.bool)).backward()
    trained = [(name, p) for name, p in head.named_parameters() if p.requires_grad]
    without = [name for name, p in trained if p.grad is None or not p.grad.any()]
    assert without == []
    assert features.cognition.grad is not None
    assert features.cognition.grad.abs().sum(-1).gt(0).all()
    layers = backbone.language_layers()
    moved = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers]
    assert all(moved)


def test_the_cognition_and_every_layers_keys_reach_the_actions(backbone: Backbone, features: Features) -> None:
    head, target = build(TokensConfig(), backbone), chunks()
    weight = torch.ones_like(target, dtype=torch.bool)
    plain = head.loss(features, target, weight)
    other = replace(features, cognition=-features.cognition)
    assert not torch.allclose(head.loss(other, target, weight), plain)
    assert features.layers is not None
    for layer in range(backbone.num_layers):
        keys = features.layers.keys.clone()
        keys[:, layer] += torch.randn(keys[:, layer].shape, generator=torch.Generator().manual_seed(0))
        changed = replace(features, layers=replace(features.layers, keys=keys))
        assert not torch.equal(head.loss(changed, target, weight), plain)


def test_padding_has_no_influence(config: TokensConfig, backbone: Backbone, features: Features) -> None:
    head, target = build(config, backbone), chunks()
    weight = torch.ones_like(target, dtype=torch.bool)
    weight[0, 2:], weight[1] = False, False
    other = torch.where(weight, target, -target.roll(1, 0))
    assert head.loss(features, target, weight) == head.loss(features, other, weight)
    assert head.loss(features, target, torch.zeros_like(weight)) == 0
    padded = replace(
        features, layers=features.layers and features.layers.padded(features.layers.valid.shape[1] + 3)
    )
    assert torch.equal(head.sample(padded), head.sample(features))


def test_constant_dimensions_are_not_written(config: TokensConfig, backbone: Backbone, features: Features) -> None:
    head, target = build(config, backbone), chunks()
    if isinstance(config.tokenizer, RVQTokensConfig):
        with pytest.raises(ValueError, match=r"4 actions with 3 dimensions, and model\.chunk has .* 2 dimensions"):
            head.set_varies(torch.tensor([True, False, True]))
        return
    head.set_varies(torch.tensor([True, False, True]))
    weight = torch.ones_like(target, dtype=torch.bool)
    weight[..., 1] = False
    other = target.clone()
    other[..., 1] = 0.7
    assert head.loss(features, target, weight) == head.loss(features, other, weight)
    if head.tokenizer.fixed:
        assert head.write(features).shape == (3, CHUNK * 2)
    assert not head.sample(features)[..., 1].any()


def test_the_mean_chunk_is_differentiable_where_tokens_have_a_mean(
    config: TokensConfig, backbone: Backbone, features: Features
) -> None:
    """What probes and Fisher information read; a head that is certain means what it writes."""
    head = build(config, backbone)
    if config.tokenizer == FAST:
        with pytest.raises(ValueError, match="the mean of its tokens is no chunk"):
            head.expected(features)
        return
    (head.expected(features).square().sum()).backward()
    assert head.first.weight.grad is not None
    assert head.first.weight.grad.any()
    if config.ids == "own":
        with torch.no_grad():
            head.out.weight.mul_(1e8)
            head.out.bias.mul_(1e8)
        torch.testing.assert_close(head.expected(features), head.sample(features), atol=1e-3, rtol=1e-3)


def test_a_tokenizer_of_what_varies_is_built_beside_dimensions_that_do_not(
    rvq: TokensConfig, backbone: Backbone
) -> None:
    torch.manual_seed(0)
    head = rvq.build(backbone, 5, CHUNK, ACTIONS + 2)
    head.set_varies(torch.tensor([True, False, True, True, False]))
    assert head.written == [0, 2, 3]
    with pytest.raises(ValueError, match=r"4 actions with 3 dimensions, and model\.chunk has .* 5 dimensions"):
        head.set_varies(torch.ones(ACTIONS + 2, dtype=torch.bool))


def test_held_repeats_the_last_action_that_exists() -> None:
    chunk = torch.arange(1.0, 9).view(2, 4, 1)
    valid = torch.tensor([[True, True, False, False], [False, True, False, True]])
    assert held(chunk, valid)[..., 0].tolist() == [[1, 2, 2, 2], [0, 6, 6, 8]]


def test_logits_that_are_no_numbers_move_nothing(backbone: Backbone, features: Features) -> None:
    head = build(TokensConfig(), backbone)
    torch.nn.init.constant_(head.out.bias, torch.nan)
    with pytest.raises(ActionTokenError, match="row 0: the logits of its action tokens are not finite"):
        head.sample(features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": "beam"}, r"head\.decoding is 'beam'; choose one of autoregressive, parallel"),
        ({"ids": "first"}, r"head\.ids is 'first'; choose one of own, last"),
        ({"temperature": -1.0}, r"head\.temperature is -1\.0"),
        ({"skip": 64}, r"head\.skip is 64"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokensConfig(**settings)  # type: ignore[arg-type]


def test_a_row_ends_where_its_chunk_is_complete(backbone: Backbone, features: Features) -> None:
    """Rows of a batch stop at different lengths, and what follows one's end is no token."""
    head, different = build(TokensConfig(FAST, temperature=2.0), backbone), 0
    for seed in range(5):
        noise = draw_noise([seed, seed + 5, seed + 10], head.noise_shape or ())
        tokens = head.write(features, noise)
        lengths = (tokens != NO_TOKEN).sum(1)
        different += len(set(lengths.tolist())) > 1
        assert tokens.shape[1] == lengths.max()
        assert torch.equal(tokens != NO_TOKEN, torch.arange(tokens.shape[1]) < lengths[:, None])
    assert different


def test_chunks_of_different_lengths_are_not_written_in_parallel() -> None:
    with pytest.raises(ValueError, match="parallel, and tokenizer fast writes chunks of different lengths"):
        TokensConfig(FAST, decoding="parallel").check(CHUNK)


def test_weights_of_another_tokenizer_are_refused(backbone: Backbone) -> None:
    """The sizes may be the same and every token mean something else."""
    head = build(TokensConfig(FAST), backbone)
    state = head.state_dict()
    state["fingerprint"] = state["fingerprint"] + 1
    with pytest.raises(ActionTokenError, match=r"FAST of 256 tokens.* is not the one that these weights"):
        head.load_state_dict(state)


def test_too_few_ids_are_refused() -> None:
    backbone = TinyConfig(width=16, heads=2, mlp=16, trunk_channels=4).build(5, 1, 28)
    with pytest.raises(ValueError, match=r"256 action tokens and head\.skip 300 exceed the backbone's 512 ids"):
        TokensConfig(ids="last", skip=300).build(backbone, 5, CHUNK, ACTIONS)


def test_a_backbone_that_cannot_write_on_is_refused() -> None:
    backbone = WordsConfig().build(5, 1, 28)
    with pytest.raises(ValueError, match=r"head\.type tokens needs a backbone .* WordsBackbone has no `extend`"):
        TokensConfig().build(backbone, 5, CHUNK, ACTIONS)
