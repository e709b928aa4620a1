"""RVQ: the public arithmetic, codes that live, training that resumes, and every row of codes a chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ipvla.models.action_tokens import ActionTokenError, RVQTokensConfig
from ipvla.models.action_tokens.rvq import Quantiser, RVQPart, RVQSettings, RVQTokens, one_part

GOLDEN = Path(__file__).with_name("golden") / "rvq"
#: Two arms, each of position, 6-D rotation and gripper.
PARTS = {
    "pos": RVQPart((0, 1, 2, 10, 11, 12), 3),
    "rot": RVQPart((*range(3, 9), *range(13, 19)), 2, rotation=True),
    "grip": RVQPart((9, 19), 1),
}
_OURS = {"ema_cluster_size": "sizes", "ema_w": "sums", "codebook.weight": "codebook", "weight": "codebook"}
SMALL = RVQSettings(8, one_part(7, 3), codes=32, code_dim=4, latent=16, channels=4)


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def published() -> RVQTokens:
    tokenizer = RVQTokens(RVQSettings(24, tuple(PARTS.values()), codes=16, code_dim=4, latent=8, channels=4))
    state = dict(tokenizer.state_dict())
    for name, value in load_file(GOLDEN / "weights.safetensors").items():
        part, inside = name.split("_vqvae.")
        module, _, tensor = inside.replace("vq.quantizers", "quantizers").partition(".ema_")
        ours = f"{module}.{_OURS['ema_' + tensor]}" if tensor else module.replace(".codebook.weight", ".codebook")
        key = f"parts.{list(PARTS).index(part)}.{ours}"
        assert state[key].shape == value.shape
        state[key] = value
    tokenizer.load_state_dict(state)
    return tokenizer


def smooth(seed: int = 0, batch: int = 512) -> Tensor:
    """Chunks [batch, 8, 7] of two factors."""
    random = torch.Generator().manual_seed(seed)
    offset, slope = torch.rand(2, batch, 1, 1, generator=random) - 0.5
    return offset * torch.linspace(-1, 1, 7) + slope * torch.linspace(-1, 1, 8)[:, None]


def trained(steps: int, seed: int = 0) -> RVQTokens:
    torch.manual_seed(0)
    tokenizer = RVQTokens(SMALL)
    tokenizer.fit(smooth(), steps, batch=64, lr=3e-3, seed=seed)
    return tokenizer


class TestParity:
    def test_latents_codes_and_chunks(self, published: RVQTokens, io: dict[str, Tensor]) -> None:
        codes = published.encode(io["x"])
        assert torch.equal(codes, io["ids"])
        torch.testing.assert_close(published.decode(codes, 24, 20), io["reconstruction"], atol=1e-5, rtol=1e-5)
        for name, network in zip(PARTS, published.networks(), strict=True):
            x = io["x"][..., list(network.part.dims)]
            torch.testing.assert_close(network.latent(x), io[f"latent/{name}"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                network.reconstruction(network.decode(network.encode(x)), x),
                io[f"loss/{name}"],
                atol=1e-5,
                rtol=1e-5,
            )
            torch.testing.assert_close(network.loss(x), io[f"total/{name}"], atol=1e-5, rtol=1e-5)

    def test_a_step_of_the_moving_averages(self, io: dict[str, Tensor]) -> None:
        quantiser = Quantiser(6, 8, 4)
        projections = {n: io[f"ema/{n}"] for n in quantiser.state_dict() if "_proj" in n}
        before, after = ({b: io[f"ema/{when}/{a}"] for a, b in _OURS.items() if f"ema/{when}/{a}" in io}
                         for when in ("before", "after"))  # fmt: skip
        quantiser.load_state_dict({**quantiser.state_dict(), **projections, **before})
        z = io["ema/z"].clone().requires_grad_()
        q, codes, commitment, e = quantiser(z)
        assert torch.equal(codes, io["ema/ids"])
        torch.testing.assert_close(0.25 * commitment, io["ema/vq_loss"])
        torch.testing.assert_close(q, io["ema/z_q"])
        (q.square().sum() + 0.25 * commitment).backward()
        torch.testing.assert_close(z.grad, io["ema/grad_z"])
        quantiser.update(e, codes, 64, torch.Generator())
        for name, value in after.items():
            torch.testing.assert_close(getattr(quantiser, name), value)


def test_training_lowers_the_error_and_the_round_trip_is_what_it_measures() -> None:
    losses = list[float]()
    torch.manual_seed(0)
    quick = RVQSettings(8, one_part(7, 3), codes=32, code_dim=4, latent=16, channels=8, levels=1)
    tokenizer, x = RVQTokens(quick), smooth(1)
    tokenizer.fit(smooth(), 100, batch=64, lr=5e-3, progress=lambda step, loss: losses.append(loss))
    decoded = tokenizer.decode(tokenizer.encode(x), 8, 7)
    assert losses[-1] < losses[0] / 4
    assert (decoded - x).square().mean() < x.var() / 5
    (network,) = tokenizer.networks()
    torch.testing.assert_close(
        network.reconstruction(network.decode(network.encode(x)), x), (decoded - x).square().mean()
    )


def test_dead_codes_begin_again_at_vectors_of_the_batch() -> None:
    torch.manual_seed(0)
    quantiser, random = Quantiser(4, 8, 2), torch.Generator().manual_seed(0)
    e = torch.randn(50, 2)
    codes = torch.zeros(50, dtype=torch.long)
    for _ in range(4):
        quantiser.update(e, codes, 5, random)
    assert quantiser.idle.tolist() == [0] + [4] * 7
    quantiser.update(e, codes, 5, random)
    assert quantiser.idle.tolist() == [0] * 8
    for code in range(1, 8):
        assert (quantiser.codebook[code] == e).all(1).any()
        assert torch.equal(quantiser.sums[code], quantiser.codebook[code])
        assert quantiser.sizes[code] == 1


def test_the_first_batch_places_the_codes_and_the_next_step_does_not_lose_them() -> None:
    torch.manual_seed(0)
    quantiser, random = Quantiser(4, 8, 2), torch.Generator().manual_seed(0)
    r = torch.randn(50, 2) @ torch.randn(2, 4) + 3
    quantiser.start(r, random)
    with torch.no_grad():
        e = quantiser.in_proj(r)
        torch.testing.assert_close(quantiser.out_proj(e), r, atol=1e-4, rtol=1e-4)
    placed = quantiser.codebook.clone()
    for code in placed:
        assert torch.isclose(code, e).all(1).any()
    quantiser.update(e, quantiser.nearest(e), 64, random)
    assert torch.nn.functional.cosine_similarity(quantiser.codebook, placed).min() > 0.9
    quantiser.start(-r, random)
    assert torch.nn.functional.cosine_similarity(quantiser.codebook, placed).min() > 0.9, "it starts once"


def test_a_saved_tokenizer_is_the_same_and_trains_on_from_where_it_was(tmp_path: Path) -> None:
    ours = trained(10)
    ours.save(tmp_path)
    loaded = RVQTokens.load(tmp_path)
    assert loaded.settings == ours.settings
    for tokenizer in (ours, loaded):
        tokenizer.fit(smooth(), 5, batch=64, seed=1)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ours.state_dict().items())
    frozen = RVQTokensConfig(tmp_path).build()
    assert not any(p.requires_grad for p in frozen.parameters())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_every_row_of_codes_is_a_finite_chunk(seed: int) -> None:
    torch.manual_seed(0)
    tokenizer = RVQTokens(SMALL)
    codes = torch.randint(32, (4, tokenizer.longest(8, 7)), generator=torch.Generator().manual_seed(seed))
    decoded = tokenizer.decode(codes, 8, 7)
    assert decoded.shape == (4, 8, 7)
    assert decoded.isfinite().all()
    torch.testing.assert_close(tokenizer.decode(codes[1:2], 8, 7)[0], decoded[1], atol=1e-5, rtol=1e-4)


class TestBadInput:
    @pytest.mark.parametrize(
        ("chunk", "parts", "message"),
        [
            (12, one_part(7, 3), r"model\.chunk is 12, and RVQ with 3 levels takes multiples of 8"),
            (8, (RVQPart((0, 1)), RVQPart((1, 2))), r"give each of 0\.\.3 once"),
        ],
    )
    def test_sizes(self, chunk: int, parts: tuple[RVQPart, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RVQSettings(chunk, parts)

    def test_parts(self) -> None:
        with pytest.raises(ValueError, match="give at least one of each"):
            RVQPart((), 1)
        with pytest.raises(ValueError, match="has 5 dims; give a multiple of 6"):
            RVQPart((0, 1, 2, 3, 4), rotation=True)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"head\.tokenizer\.file is not given"):
            RVQTokensConfig().build()
        with pytest.raises(ValueError, match="no RVQ tokenizer in"):
            RVQTokensConfig(tmp_path).build()

    def test_tokens(self) -> None:
        tokenizer = RVQTokens(SMALL)
        with pytest.raises(ActionTokenError, match="2 tokens, and an RVQ chunk has 3"):
            tokenizer.decode(torch.zeros(1, 2, dtype=torch.long), 8, 7)
        with pytest.raises(ActionTokenError, match=r"row 0 has token 32, and action tokens are 0\.\.31"):
            tokenizer.decode(torch.tensor([[0, 32, 1]]), 8, 7)
        with pytest.raises(ValueError, match=r"trained on chunks of 8 actions with 7 dimensions.*has 4 actions"):
            tokenizer.check(4, 7)
