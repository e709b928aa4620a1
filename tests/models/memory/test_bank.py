"""MemoryVLA's bank: what it returns, what it stores, what it merges."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from ipvla.models.memory import BankMemoryConfig
from ipvla.models.memory.bank import Bank, append
from tests.models.memory.episodes import BACKBONE, build, changed, features, run

SMALL = BankMemoryConfig(length=3, tokens=2, token_width=4, attention=5, hidden=7)


def reference(
    held: list[tuple[torch.Tensor, int]], x: torch.Tensor, t: int, length: int
) -> list[tuple[torch.Tensor, int]]:
    """One bank as a list of (entry [n, d], control step), written by the paper's words."""
    held = [*held, (x, t)]
    if len(held) > length:
        alike = [float(cosine_similarity(a, b, dim=-1).mean()) for (a, _), (b, _) in pairwise(held)]
        i = alike.index(max(alike))
        held[i : i + 2] = [((held[i][0] + held[i + 1][0]) / 2, held[i][1])]
    return held


@given(
    length=st.integers(1, 5),
    tokens=st.integers(1, 3),
    before=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_consolidation_merges_the_most_similar_adjacent_pair_and_keeps_the_earlier_time(
    length: int, tokens: int, before: list[int], seed: int
) -> None:
    """Rows that hold different numbers of entries are written together."""
    random, batch = torch.Generator().manual_seed(seed), len(before)
    entries, times = torch.zeros(batch, length, tokens, 3), torch.zeros(batch, length, dtype=torch.long)
    expected: list[list[tuple[torch.Tensor, int]]] = [[] for _ in before]
    for now in range(-max(before), 3):  # row r begins before[r] steps before 0
        x = torch.randn(batch, tokens, 3, generator=random)
        t = torch.tensor([4 * (now + b) for b in before])
        full = torch.tensor([len(held) == length for held in expected])
        written, written_t = append(entries, times, full, x, t, merge=True)
        begun = t >= 0
        entries = torch.where(begun[:, None, None, None], written, entries)
        times = torch.where(begun[:, None], written_t, times)
        for row in begun.nonzero()[:, 0].tolist():
            expected[row] = reference(expected[row], x[row], int(t[row]), length)
    for row, held in enumerate(expected):
        torch.testing.assert_close(entries[row, length - len(held) :], torch.stack([entry for entry, _ in held]))
        assert times[row, length - len(held) :].tolist() == [t for _, t in held]
        assert not entries[row, : length - len(held)].any()


def test_fifo_keeps_the_last_entries() -> None:
    module = build(
        BankMemoryConfig(length=3, tokens=2, token_width=4, attention=5, hidden=7, consolidation="fifo")
    )
    memory = run(module, features(2, 8))[1]
    assert memory["cognition_t"].tolist() == memory["perception_t"].tolist() == [[20, 24, 28]] * 2


def test_an_empty_bank_returns_its_input_untouched() -> None:
    module, x = build(SMALL), features(2)
    enriched, memory = module.step(x, module.initial(2), torch.zeros(2, dtype=torch.long))
    assert torch.equal(enriched.cognition, x.cognition)
    assert torch.equal(enriched.perception, x.perception)
    again, _ = module.step(x, memory, torch.full((2,), 4))
    assert not torch.allclose(again.cognition, x.cognition)


def test_the_gate_starts_half_open() -> None:
    torch.manual_seed(0)
    bank, x = Bank(SMALL, 6), torch.randn(2, 1, 6)
    assert 0.5e-3 < bank.gate.weight.std() < 2e-3
    gate = torch.sigmoid(bank.gate(torch.cat([x, x], -1)))
    torch.testing.assert_close(gate, torch.full_like(gate, 0.5), atol=0.01, rtol=0)


def test_it_stores_the_augmented_tokens() -> None:
    torch.manual_seed(0)
    module = SMALL.build(BACKBONE)  # fresh: the perceptual bank adds nothing to the cognition yet
    enriched, memory = run(module, features(2, 3))
    assert torch.equal(memory["cognition"][:, :, 0], enriched.cognition)
    assert not torch.allclose(enriched.cognition[:, 1:], features(2, 3).cognition[:, 1:])


def test_both_banks_reach_the_cognition() -> None:
    module, x = build(SMALL), features(1, 4)
    seen = changed(x, 0)
    only_perception = type(x)(x.cognition, seen.perception, x.proprio)
    assert not torch.allclose(run(module, x)[0].cognition[:, 3], run(module, only_perception)[0].cognition[:, 3])


def test_the_gradient_passes_through_merged_entries() -> None:
    module, x = build(SMALL), features(1, 12)
    x.cognition.requires_grad_(True)
    enriched, memory = run(module, x)
    assert memory["count"].tolist() == [3]
    (gradient,) = torch.autograd.grad(enriched.cognition[0, 11].square().sum(), x.cognition)
    assert (gradient[0].abs().sum(-1) > 0).all()


def test_what_empty_places_hold_is_never_read() -> None:
    module, x = build(SMALL), features(1, 2)
    memory = run(module, x)[1]
    scribbled = {n: v.clone() for n, v in memory.items()}
    for name in ("cognition", "perception"):
        scribbled[name][:, 0] = 1e3
    t = torch.full((1,), 8)
    assert torch.equal(
        module.step(x.at(0), memory, t)[0].cognition, module.step(x.at(0), scribbled, t)[0].cognition
    )
