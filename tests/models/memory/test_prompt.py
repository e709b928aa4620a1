"""The plan in the prompt: when it is written, what happens to one that does not parse, and that it is learned."""

import pytest
import torch

from ipvla.models.backbones import Backbone, TinyConfig
from ipvla.models.memory import PromptMemoryConfig
from ipvla.models.memory.prompt import PromptMemory, with_plan
from ipvla.types import NO_TOKEN, ModelInputs, StepBatch
from tests.models.conftest import inputs_for
from tests.models.memory.test_feeding_the_backbone import play, tiny, window

__all__ = ["tiny"]

GOOD = "PLAN: red blue SUBTASK: 1 red"


def build(backbone: Backbone, triggered: bool = False, **settings: int) -> PromptMemory:
    """Fresh weights, and a trigger that never (or always) asks for a new plan."""
    torch.manual_seed(0)
    module = PromptMemoryConfig(plan_tokens=12, **settings).build(backbone)
    torch.nn.init.zeros_(module.trigger.weight)
    torch.nn.init.constant_(module.trigger.bias, 5.0 if triggered else -5.0)
    return module.eval()


def ids(backbone: Backbone, text: str, size: int = 12) -> torch.Tensor:
    tokens = backbone.tokenize_text(text)
    return torch.tensor([tokens + [NO_TOKEN] * (size - len(tokens))])


def says(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, text: str) -> list[ModelInputs]:
    """Makes the backbone write `text` whatever it sees; returns the prompts it is asked with."""
    asked: list[ModelInputs] = []

    def write(inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        asked.append(inputs)
        return ids(backbone, text, max_new_tokens).expand(len(inputs.input_ids), -1)

    monkeypatch.setattr(backbone, "write", write)
    return asked


def test_the_plan_stands_before_the_prompts_last_token(backbone: Backbone) -> None:
    inputs = inputs_for(backbone, ["press", "press the red button"])
    plan = torch.cat([ids(backbone, "red blue"), torch.full((1, 12), NO_TOKEN)])
    prompted = with_plan(inputs, plan)
    for row, words in enumerate((backbone.tokenize_text("red blue"), [])):
        before = inputs.input_ids[row][inputs.attention_mask[row]].tolist()
        after = prompted.input_ids[row][prompted.attention_mask[row]].tolist()
        assert after == [*before[:-1], *words, before[-1]]
        assert prompted.attention_mask[row].long().diff().le(0).all(), "padding stays at the end"


def test_it_is_written_at_the_start_and_then_only_when_the_trigger_says_so(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    for triggered, times in ((False, 1), (True, 5)):
        asked = says(tiny, monkeypatch, GOOD)
        _, memory = play(build(tiny, triggered), tiny, window(tiny, 1, 5))
        assert len(asked) == times
        assert memory["written"].tolist() == [times * len(tiny.tokenize_text(GOOD))]
        assert tiny.detokenize(memory["plan"][0].tolist()).upper().replace(" :", ":") == GOOD.upper()


@pytest.mark.parametrize(("refresh", "writings"), [(1, 6), (2, 3), (4, 2), (100, 1)])
def test_refresh_is_the_longest_life_of_a_plan(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch, refresh: int, writings: int
) -> None:
    asked = says(tiny, monkeypatch, GOOD)
    play(build(tiny, refresh=refresh), tiny, window(tiny, 1, 6))
    assert len(asked) == writings


def test_a_rewriting_reads_the_old_plan(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = says(tiny, monkeypatch, GOOD)
    play(build(tiny, refresh=1), tiny, window(tiny, 1, 2))
    first, second = (int(inputs.attention_mask.sum()) for inputs in asked)
    assert second - first == len(tiny.tokenize_text(GOOD))


def test_a_plan_that_does_not_parse_is_not_taken(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = build(tiny, refresh=1), window(tiny, 1, 1)
    says(tiny, monkeypatch, GOOD)
    _, memory = play(module, tiny, batch)
    for text in ("red blue red", "PLAN: SUBTASK: 1 red", "SUBTASK: red SUBTASK: blue", "SUBTASK: 1 red"):
        says(tiny, monkeypatch, text)
        _, after = play(module, tiny, batch, memory)
        assert torch.equal(after["plan"], memory["plan"]), "the old one stays"
        assert (after["refused"] - memory["refused"]).tolist() == [1]


def test_only_rows_whose_plan_is_due_are_written(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = says(tiny, monkeypatch, GOOD)
    module = build(tiny)
    _, memory = play(module, tiny, window(tiny, 3, 1))
    memory["age"] = torch.tensor([0, -1, 0])
    play(module, tiny, window(tiny, 3, 1, first_t=4), memory)
    assert [len(inputs.input_ids) for inputs in asked] == [3, 1]


def test_a_plan_shown_once_is_learned_and_then_kept() -> None:
    """The picture is bright or dark at the first step alone; the plan says which until the end."""
    torch.manual_seed(0)
    backbone = TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28)
    module = PromptMemoryConfig(plan_tokens=12, weight=1.0).build(backbone)
    batch = bright_or_dark(backbone)
    parameters = [*backbone.parameters(), *module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        _, _, loss = module.window(backbone, batch, module.initial(2))
        assert loss is not None
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    seen, memory = play(module.eval(), backbone.eval(), batch)
    plans = [backbone.detokenize(plan) for plan in memory["plan"].tolist()]
    assert plans == ["plan : red subtask : 1 red", "plan : blue subtask : 1 blue"]
    assert memory["written"].tolist() == [7, 7], "written once"
    assert not torch.allclose(seen[-1].cognition[0], seen[-1].cognition[1]), "the same picture, another plan"


def bright_or_dark(backbone: Backbone) -> StepBatch:
    batch = window(backbone, 2, 5)
    batch.inputs.images[:] = 100
    batch.inputs.images[0, 0], batch.inputs.images[1, 0] = 220, 20
    batch.inputs.proprio[:] = 0
    batch.inputs.input_ids[1], batch.inputs.attention_mask[1] = (
        batch.inputs.input_ids[0],
        batch.inputs.attention_mask[0],
    )
    batch.is_first[:, 0] = True
    plans = [ids(backbone, f"PLAN: {colour} SUBTASK: 1 {colour}") for colour in ("red", "blue")]
    batch.plan = torch.stack(plans).expand(2, 5, -1).clone()
    batch.last_plan = batch.plan.clone()
    batch.last_plan[:, 0] = NO_TOKEN
    return batch


def test_episodes_without_plans_are_refused(tiny: Backbone) -> None:
    batch = bright_or_dark(tiny)
    batch.plan[:], batch.last_plan[:] = NO_TOKEN, NO_TOKEN
    module = build(tiny)
    with pytest.raises(ValueError, match="carry no plans"):
        module.window(tiny, batch, module.initial(2))


def test_an_idle_window_trains_nothing(tiny: Backbone) -> None:
    batch = bright_or_dark(tiny)
    batch.valid[:], batch.plan[:], batch.last_plan[:] = False, NO_TOKEN, NO_TOKEN
    module = build(tiny)
    _, memory, loss = module.window(tiny, batch, module.initial(2))
    assert loss is not None
    assert loss.item() == 0
    assert torch.equal(memory["plan"], module.initial(2)["plan"])
