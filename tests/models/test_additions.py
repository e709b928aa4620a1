"""A backbone, a memory and heads from outside of the package: built, trained, saved, loaded, played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.plan import PlanPosition
from ipvla.data.rlds import write_rlds
from ipvla.data.transforms import PromptEncoder
from ipvla.experiment import DataConfig, Experiment, ExperimentConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.models.auxiliary_losses import QuestionsConfig
from ipvla.models.backbones import Backbone, Context, Embedded, PaliGemmaConfig, TinyConfig
from ipvla.models.features import Reads
from ipvla.models.heads import RegressionConfig
from ipvla.models.heads.protocol import draw_noise
from ipvla.models.memory import (
    ChainMemoryConfig,
    GRUMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    MemoryConfig,
    PromptMemoryConfig,
)
from ipvla.models.memory.prompt import with_plan
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.policy_server import PolicyServer
from ipvla.tracking import Sinks
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ipvla.training.readers import FeatureReader
from ipvla.types import NO_TOKEN, Episode, Observation
from tests.models.conftest import inputs_for
from tests.models.memory.test_feeding_the_backbone import build, cut, play, window
from tests.models.outside import WORDS, FlowConfig, LastConfig, LayersConfig, WordsBackbone, WordsConfig
from tests.synthetic import SIZE, cue_episode

Make = Callable[..., ExperimentConfig]
TINY = TinyConfig(width=16, heads=2, mlp=16, trunk_channels=4)


def exclaiming_episode(seed: int) -> Episode:
    """With the word at id 0 in instruction, plan, question and answer."""
    episode = cue_episode(seed)
    length = len(episode.action)
    return replace(
        episode,
        instruction="press the button !" if seed % 2 else "press !",
        reasoning=("PLAN: press ! SUBTASK: ! !",) * length,
        questions=("is a button lit !",) * length,
        answers=("! !",) * length,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    write_rlds(root / "datasets", "cue", [exclaiming_episode(seed) for seed in range(8)], SIZE)
    return root


@pytest.fixture
def make(make_experiment: Make, root: Path) -> Callable[..., ExperimentConfig]:
    """Two windows of training on these episodes."""

    def configured(**model: object) -> ExperimentConfig:
        model = {"backbone": TINY, "memory": GRUMemoryConfig(8), "head": RegressionConfig(16), "chunk": 2, **model}
        return make_experiment(
            storage_root=root,
            data=DataConfig(dataset="cue", image_size=SIZE),
            model=IPVLAConfig(**model),  # type: ignore[arg-type]
            training=TrainingConfig(steps=2, precision="fp32"),
        )

    return configured


def trained(config: ExperimentConfig) -> Experiment:
    experiment = config.build(World())
    train(
        experiment.state, experiment.lanes, config.training, config.optimizer, World(), Sinks(), save=lambda: None
    )
    experiment.policy.model.eval()
    return experiment


def observations(experiment: Experiment, t: int = 0) -> list[Observation]:
    """Of three episodes, the same step each."""
    dataset = experiment.lanes._dataset
    seen = [dataset.observation(episode, t, ("agentview",)) for episode in range(3)]
    return [replace(one, episode=f"suite/cue/{i}/7") for i, one in enumerate(seen)]


ADDED: dict[str, dict[str, object]] = {
    "memory": {"memory": LastConfig()},
    "backbone": {"backbone": WordsConfig(), "lora": LoRAConfig(rank=2, modules=("q_proj", "v_proj"))},
    "backbone and words": {
        "backbone": WordsConfig(),
        "memory": PromptMemoryConfig(plan_tokens=8),
        "questions": QuestionsConfig(share=1.0),
    },
    "head with noise": {"head": FlowConfig()},
    "head that reads layers": {"head": LayersConfig(), "memory": LatentMemoryConfig(2)},
    "all": {"backbone": WordsConfig(), "memory": LastConfig(), "head": LayersConfig()},
    "all, in a chain with noise": {
        "backbone": WordsConfig(),
        "memory": ChainMemoryConfig([LatentMemoryConfig(2), LastConfig()]),
        "head": FlowConfig(),
    },
}


@pytest.mark.parametrize("name", ADDED)
def test_it_trains_acts_and_comes_back(name: str, make: Make, tmp_path: Path) -> None:
    config = make(**ADDED[name])
    experiment = config.build(World())
    before = {n: p.clone() for n, p in experiment.state.model.named_parameters()}
    train(
        experiment.state, experiment.lanes, config.training, config.optimizer, World(), Sinks(), save=lambda: None
    )
    moved = {
        n.partition(".")[0] for n, p in before.items() if not p.equal(experiment.state.model.get_parameter(n))
    }
    assert moved >= {"backbone", "head"}
    policy = experiment.policy
    policy.model.eval()
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert loaded.config == config.model
    memory, same = policy.initial_memory(3), loaded.initial_memory(3)
    for t in (0, 2, 4):
        chunk, memory = policy.act(observations(experiment, t), memory)
        again, same = loaded.act(observations(experiment, t), same)
        assert chunk.shape == (3, 2, 7)
        np.testing.assert_array_equal(chunk, again)


class TestAWordAtIdZero:
    """Padding is told by masks and NO_TOKEN, never by a token id."""

    @pytest.fixture
    def backbone(self) -> WordsBackbone:
        torch.manual_seed(0)
        assert WORDS.index("!") == 0
        assert WORDS.index("<pad>") == len(WORDS) - 1
        return WordsConfig().build(5, 1, 28).eval()  # type: ignore[return-value]

    def test_it_is_read_in_prompts_and_padding_is_not(self, backbone: WordsBackbone) -> None:
        inputs = inputs_for(backbone, ["press", "press !", "press the red button !"])
        cognition = backbone(inputs).features.cognition
        assert not torch.allclose(cognition[0], cognition[1], atol=1e-4)
        for row in range(3):
            alone = backbone(inputs.map(lambda x, r=row: x[r : r + 1])).features.cognition[0]
            torch.testing.assert_close(alone, cognition[row], rtol=1e-4, atol=1e-5)
        assert backbone(inputs).instruction_mask.sum(1).tolist() == [1, 2, 5]

    def test_it_is_learned_and_given_as_an_answer(self, backbone: WordsBackbone) -> None:
        inputs, questions = inputs_for(backbone, ["press"] * 2), ["is the button lit !", "is the red button lit"]
        optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = backbone.answer_loss(inputs, questions, ["! yes !", "no"])
            loss.backward()
            optimizer.step()
        assert loss < 0.1
        assert backbone.answer(inputs, questions) == ["! YES !", "NO"]

    def test_it_stands_in_plans_in_the_prompt(self, backbone: WordsBackbone) -> None:
        inputs = inputs_for(backbone, ["press !", "press"])
        plans = torch.tensor([[0, 3, 0, NO_TOKEN], [NO_TOKEN] * 4])
        prompted = with_plan(inputs, plans)
        texts = [ids[mask].tolist() for ids, mask in zip(*prompt_of(prompted), strict=True)]
        act = WORDS.index("<act>")
        assert texts == [[1, 0, 0, 3, 0, act], [1, act]]

    def test_batches_carry_it(self, make: Make) -> None:
        settings = ADDED["backbone and words"]
        experiment = make(**settings).build(World())
        batch = experiment.lanes.batch(PlanPosition())
        place = batch.valid.nonzero()[0].tolist()
        words = experiment.policy.model.backbone.tokenize_text("PLAN: press ! SUBTASK: ! !")
        assert words.count(0) == 3
        assert batch.plan[place[0], place[1]].tolist() == words
        assert batch.answer[place[0], place[1]].tolist() == [0, 0]
        assert experiment.policy.model.questions is not None
        assert torch.equal(experiment.policy.model.questions.asked(batch), batch.valid)
        idle = ~batch.valid
        assert (batch.answer[idle] == NO_TOKEN).all()


def prompt_of(inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.input_ids, inputs.attention_mask  # type: ignore[attr-defined]


class TestACausalBackbone:
    @pytest.fixture
    def backbone(self) -> Backbone:
        torch.manual_seed(0)
        return WordsConfig().build(5, 1, 28).eval()

    def test_the_observation_reads_context_tokens_and_they_read_it(self, backbone: Backbone) -> None:
        inputs = inputs_for(backbone, ["press", "press the red button"])
        inputs.proprio.requires_grad_(True)
        embedded = backbone.embed(inputs)
        tokens = torch.randn(2, 3, backbone.width, requires_grad=True)
        output, plain = backbone.encode(embedded, Context(tokens=tokens)), backbone.encode(embedded)
        assert output.context_tokens is not None
        assert output.context_tokens.shape == tokens.shape
        assert [h.shape for h in output.hidden_states] == [h.shape for h in plain.hidden_states]
        for row in range(2):
            (read,) = torch.autograd.grad(
                output.features.cognition[row, ::2].square().sum(), tokens, retain_graph=True
            )
            assert read[row].abs().sum(-1).gt(0).all(), "the prompt reads every latent"
            assert not read[1 - row].any()
            written = output.context_tokens[row].square().sum()
            (wrote,) = torch.autograd.grad(written, inputs.proprio, retain_graph=True)
            assert wrote[row].any(), "latents read the observation"
        first = output.hidden_states[-1][:, 0]
        assert not torch.allclose(first, plain.hidden_states[-1][:, 0]), "also what stands before the prompt"

    @pytest.mark.parametrize("config", [LatentMemoryConfig(2), KVMemoryConfig(length=2)], ids=str)
    def test_what_was_seen_reaches_the_next_cognition_through_memory(
        self, backbone: Backbone, config: MemoryConfig
    ) -> None:
        module = build(config, backbone)
        a, b = window(backbone, 2, 3), window(backbone, 2, 3)
        b.inputs.images[:, 0] = 255 - b.inputs.images[:, 0]
        seen, other = play(module, backbone, a)[0], play(module, backbone, b)[0]
        assert not torch.allclose(seen[1].cognition, other[1].cognition, atol=1e-4)
        features, _, _ = module.window(backbone, a, module.initial(2))
        for k, step in enumerate(seen):
            torch.testing.assert_close(features.at(k).cognition, step.cognition, rtol=1e-4, atol=1e-5)


def test_blocks_are_joined_as_the_backbone_declares(make: Make) -> None:
    torch.manual_seed(0)
    backbone = WordsConfig().build(5, 1, 28).eval()
    blocks = [backbone.embed(inputs_for(backbone, words)) for words in (["press"], ["press the red button !"] * 2)]
    whole = Embedded.joined(blocks)
    longest = blocks[1].tokens.shape[1]
    assert whole.extra["positions"].shape == (3, longest, 3)
    assert not whole.extra["positions"][0, blocks[0].tokens.shape[1] :].any()
    assert whole.extra["deep"].shape[:2] == (3, 4)
    cognition = backbone.encode(whole).features.cognition
    apart = torch.cat([backbone.encode(block).features.cognition for block in blocks])
    torch.testing.assert_close(cognition, apart, rtol=1e-4, atol=1e-5)
    windows = whole.map(lambda x: x[:, None])
    assert torch.equal(windows.at(0).extra["deep"], whole.extra["deep"])


class TestNoise:
    @pytest.fixture(scope="class")
    def experiment(self, tmp_path_factory: pytest.TempPathFactory, root: Path) -> Experiment:
        config = ExperimentConfig(
            storage_root=root,
            run_root_dir=tmp_path_factory.mktemp("runs"),
            data=DataConfig(dataset="cue", image_size=SIZE),
            model=IPVLAConfig(TINY, GRUMemoryConfig(8), FlowConfig(), chunk=2),
            lanes=replace(ExperimentConfig().lanes, lanes=4, window=6, stride=2),
            training=TrainingConfig(steps=2, precision="fp32"),
        )
        return trained(config)

    def test_rows_are_drawn_from_their_seeds_alone(self) -> None:
        rows = draw_noise([5, 2**63 - 1, 0], (3, 7))
        assert rows.dtype == torch.float32
        assert torch.equal(draw_noise([2**63 - 1], (3, 7))[0], rows[1])
        assert not torch.equal(rows[0], rows[2])
        many = draw_noise(range(400), (50,))
        assert abs(float(many.mean())) < 0.02
        assert abs(float(many.std()) - 1) < 0.02

    def test_a_chunk_does_not_depend_on_who_shares_the_batch(self, experiment: Experiment) -> None:
        policy, seen = experiment.policy, observations(experiment)
        state = torch.random.get_rng_state()
        together, _ = policy.act(seen, policy.initial_memory(3))
        torch.manual_seed(1)
        for row, one in enumerate(seen):
            alone, _ = policy.act([one], policy.initial_memory(1))
            np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
        torch.random.set_rng_state(state)
        again, _ = policy.act(seen, policy.initial_memory(3))
        np.testing.assert_array_equal(again, together)
        assert torch.equal(torch.random.get_rng_state(), state), "no global generator is used"

    def test_it_differs_between_episodes_and_between_steps(self, experiment: Experiment) -> None:
        policy, one = experiment.policy, observations(experiment)[0]
        others = [one, replace(one, episode="suite/cue/1/8"), replace(one, t=one.t + 2)]
        chunks, _ = policy.act(others, policy.initial_memory(3))
        assert np.abs(chunks[1] - chunks[0]).max() > 1e-2
        assert np.abs(chunks[2] - chunks[0]).max() > 1e-2

    def test_the_policy_server_gives_each_episode_its_own(self, experiment: Experiment) -> None:
        policy = experiment.policy
        steps = [observations(experiment, t) for t in (0, 2, 4)]
        together, alone, unnamed = (PolicyServer(policy) for _ in range(3))
        for k, seen in enumerate(steps):
            order = [(0, 1, 2), (2, 0, 1), (1, 2, 0)][k]
            chunks = dict(
                zip(
                    order,
                    together.forward([together.admit(EpisodeId(f"{i}", 0), k, seen[i]) for i in order]),
                    strict=True,
                )
            )
            for i, one in enumerate(seen):  # another attempt at the same episode
                (chunk,) = alone.forward([alone.admit(EpisodeId(f"{i}", 3), k, one)])
                np.testing.assert_allclose(chunk, chunks[i], atol=1e-5)
        anonymous = replace(steps[0][0], episode="")
        a, b = unnamed.forward([unnamed.admit(EpisodeId(name), 0, anonymous) for name in ("a", "b")])
        assert np.abs(a - b).max() > 1e-2, "sessions that nobody names differ as well"

    def test_a_policy_that_is_probed_takes_the_same_noise_for_every_record(self, experiment: Experiment) -> None:
        probed, seen = FeatureReader(experiment.policy.model, "tiny"), observations(experiment)
        inputs = experiment.policy.transforms.inputs(seen)
        with torch.no_grad():
            together = probed.read(inputs).output
            for row in range(3):
                alone = probed.read(inputs.map(lambda x, r=row: x[r : r + 1])).output
                torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)

    def test_training_draws_from_epoch_episode_and_step(self, make: Make) -> None:
        config = make(head=FlowConfig())
        drawn: dict[tuple[int, int, int], int] = {}
        for lanes in (replace(config.lanes, lanes=4), replace(config.lanes, lanes=2, window=3)):
            reader = replace(config, lanes=lanes).build(World()).lanes
            for epoch in range(2):
                for w in range(reader.plan(PlanPosition(epoch)).num_windows):
                    batch = reader.batch(PlanPosition(epoch, w))
                    for place in batch.valid.nonzero().tolist():
                        key = (epoch, int(batch.episode_key[tuple(place)]), int(batch.t[tuple(place)]))
                        seed = int(batch.noise_seed[tuple(place)])
                        assert drawn.setdefault(key, seed) == seed
        assert len(set(drawn.values())) == len(drawn)

    def test_training_is_the_same_whatever_the_global_generator_does(self, make: Make) -> None:
        config, weights = make(head=FlowConfig()), []
        for seed in (1, 2):
            experiment = config.build(World())
            torch.manual_seed(seed)
            train(
                experiment.state,
                experiment.lanes,
                config.training,
                config.optimizer,
                World(),
                Sinks(),
                save=lambda: None,
            )
            weights.append(experiment.state.model.head.state_dict())
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class TestAHeadThatReadsLayers:
    @pytest.fixture(params=["tiny", "paligemma", "outside"])
    def backbone(self, request: pytest.FixtureRequest, paligemma_directory: Path) -> Backbone:
        torch.manual_seed(0)
        config = {
            "tiny": TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8),
            "paligemma": PaliGemmaConfig(str(paligemma_directory), dtype="float32", max_prompt_tokens=24),
            "outside": WordsConfig(),
        }[request.param]
        backbone = config.build(5, 1, 28).eval()
        backbone.reads = Reads(hidden=(0, -1), keys_values=(1, -1)).of(backbone.num_layers)
        return backbone

    def test_it_is_given_just_what_it_declares(self, backbone: Backbone) -> None:
        embedded = backbone.embed(inputs_for(backbone, ["press", "press the red button"]))
        for context in (Context(keep=2), Context(torch.randn(2, 3, backbone.width), keep=2)):
            output = backbone.encode(embedded, context)
            layers, last_keys_values = output.features.layers, output.last_keys_values
            assert layers is not None
            assert last_keys_values is not None
            assert torch.equal(layers.valid, embedded.valid)
            for place, number in enumerate((0, backbone.num_layers)):
                assert torch.equal(layers.hidden[:, place], output.hidden_states[number])
            for states, expected in ((layers.keys, last_keys_values[0]), (layers.values, last_keys_values[1])):
                assert states.shape == (2, 2, embedded.tokens.shape[1], backbone.cache_size)
                for row in range(2):
                    last = int(embedded.last[row])
                    ours = states[row, :, last - 1 : last + 1]
                    torch.testing.assert_close(ours, expected[row, [1, -1]], rtol=1e-4, atol=1e-5)
        backbone.reads = Reads()
        assert backbone.encode(embedded).features.layers is None

    @pytest.mark.parametrize("config", [GRUMemoryConfig(5), LatentMemoryConfig(2), KVMemoryConfig(2)], ids=str)
    def test_training_windows_give_what_rollout_gives(self, backbone: Backbone, config: MemoryConfig) -> None:
        module, batch = build(config, backbone), window(backbone, 2, 3)
        features, _, _ = module.window(backbone, batch, module.initial(2))
        steps, _ = play(module, backbone, batch)
        for k, step in enumerate(steps):
            ours = features.at(k).layers
            assert ours is not None
            assert step.layers is not None
            valid = step.layers.valid
            assert torch.equal(ours.valid, valid)
            for name in ("hidden", "keys", "values"):
                a, b = (getattr(x, name).detach().transpose(1, 2)[valid] for x in (ours, step.layers))
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    def test_a_rewritten_plan_changes_the_number_of_tokens_of_some_rows(self, backbone: Backbone) -> None:
        module = PromptMemoryConfig(plan_tokens=6, refresh=1).build(backbone).eval()
        batch = window(backbone, 3, 1)
        memory = module.initial(3)
        memory["age"] = torch.tensor([0, -1, 0])
        torch.nn.init.constant_(module.trigger.bias, -9.0)  # type: ignore[union-attr, arg-type]
        together, _ = play(module, backbone, batch, memory)
        for row in range(3):
            state = {name: value[row : row + 1] for name, value in memory.items()}
            alone, _ = play(module, backbone, cut(batch, slice(row, row + 1)), state)
            ours, theirs = together[0].layers, alone[0].layers
            assert ours is not None
            assert theirs is not None
            assert int(ours.valid[row].sum()) == int(theirs.valid.sum())
            a, b = ours.keys[row][:, ours.valid[row]], theirs.keys[0][:, theirs.valid[0]]
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_layers_that_the_backbone_lacks_are_refused(make: Make) -> None:
    for reads, message in (
        (LayersConfig(hidden=(4,)), r"model\.head reads hidden \[4\], and the backbone has 3 language layers"),
        (LayersConfig(keys_values=(3, -4)), r"reads keys_values \[3, -4\].*choose among 0\.\.2"),
    ):
        with pytest.raises(ValueError, match=message):
            make(backbone=WordsConfig(), head=reads).build(World())


def test_a_memory_says_for_itself_and_its_parts_that_it_does_not_shard(make: Make) -> None:
    prompt = PromptMemoryConfig(plan_tokens=8)
    for memory, name in ((prompt, "prompt"), (ChainMemoryConfig([prompt, GRUMemoryConfig(8)]), "chain")):
        config = make(memory=memory)
        with pytest.raises(ValueError, match=rf"fsdp, which model\.memory\.type {name} cannot"):
            replace(config, training=replace(config.training, sharding="fsdp"))


def test_one_function_makes_every_row_of_tokens() -> None:
    encoder = PromptEncoder(
        lambda text: [0] * len(text),
        4,
        tokenize_text=lambda text: [9],
        plan_tokens=2,
        question_tokens=3,
        answer_tokens=1,
    )
    assert encoder.prompt("ab").tolist() == [0, 0, NO_TOKEN, NO_TOKEN]
    assert encoder.prompt("").tolist() == [NO_TOKEN] * 4
    assert encoder.plan("ab").tolist() == [9, NO_TOKEN]
    assert encoder.question("ab").tolist() == [0, 0, NO_TOKEN]
    assert encoder.answer("ab").tolist() == [9]
