"""An imported OpenVLA answers what its public code answered, and is a policy as any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ipvla.data.fitting import Fitting
from ipvla.data.standards.standard import padded_before_gripper
from ipvla.data.statistics import Statistics
from ipvla.models.action_tokens import ActionTokenError
from ipvla.models.heads.openvla_tokens import OpenVLATokensHead
from ipvla.models.memory import BankMemoryConfig, GRUMemoryConfig, MemoryConfig
from ipvla.policy import Policy
from ipvla.types import Observation, StepBatch
from ray_jobs.import_policy import ImportConfig, ImportedModelConfig, fine_tuning, imported, main
from tests.checkpoints.conftest import HERE, close, golden, golden_json, pictures

TASKS = golden_json("predict_action")


def observation(task: str, picture: str, t: int = 0) -> Observation:
    return Observation({"agentview": pictures()[picture]}, np.zeros(8, np.float32), task, t)


def act(policy: Policy, observations: list[Observation]) -> np.ndarray:
    return policy.act(observations, policy.initial_memory(len(observations)))[0]


@pytest.fixture(scope="module")
def policy(openvla: Path, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """As it comes out of its directory again."""
    directory = tmp_path_factory.mktemp("policies") / "openvla"
    main(ImportConfig(openvla, directory, unnorm_key="toy_libero_no_noops"))
    return Policy.load(directory)


@pytest.mark.parametrize("case", TASKS, ids=range(len(TASKS)))
def test_actions_are_the_published_ones(policy: Policy, case: dict[str, Any]) -> None:
    answer = act(policy.unnormalised_as(case["unnorm_key"]), [observation(case["task"], case["picture"])])[0, 0]
    np.testing.assert_allclose(answer[:6], case["action"][:6], rtol=0, atol=1e-6)
    assert answer[6] == (1 if case["action"][6] < 0.5 else -1), "the simulator's gripper: +1 closes"
    ids = case["prompt_ids"]
    assert policy.model.backbone.tokenize(case["task"]) == ids


def test_a_batch_answers_as_its_rows_alone(policy: Policy) -> None:
    several = [observation(case["task"], case["picture"]) for case in TASKS]
    together = act(policy, several)
    alone = np.concatenate([act(policy, [one]) for one in several])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together.round(6), axis=0)) > 2, "pictures and tasks matter"


@pytest.mark.parametrize("how", ["resize-naive", "resize-crop", "letterbox"])
def test_pictures_are_made_square_as_published(how: str) -> None:
    import hashlib

    expected, described = golden("preprocess_224"), golden_json("preprocess_224")[how]
    shape = {"resize-naive": "stretch", "resize-crop": "crop", "letterbox": "pad"}[how]
    made = Fitting(shape, "bicubic", tuple(described["letterbox_fill"] or (0, 0, 0)))(expected["picture"], 224)  # type: ignore[arg-type]
    assert np.array_equal(made[::4, ::4], expected[f"{how}:uint8_every_4th"])
    assert hashlib.sha256(made.tobytes()).hexdigest() == described["sha256_uint8_hwc"]


def test_numbers_and_words() -> None:
    known = golden_json("tokenization")
    head = OpenVLATokensHead.__new__(OpenVLATokensHead)
    torch.nn.Module.__init__(head)
    head.end_of_words, head.shape = 32000, (1, 7)
    for case in known["action_to_text_to_ids"]:
        assert head.words(torch.tensor([case["action"]])).tolist() == case["ids"][1:]
    read = {int(word): number for word, number in known["ids_to_action"].items()}
    numbers = {word: number for word, number in read.items() if 31744 <= word < 32000}
    head.shape = (1, len(numbers))
    close(head.actions(torch.tensor(list(numbers)))[0], np.array(list(numbers.values())), 1e-6)
    head.shape = (1, 1)
    for word in read.keys() - numbers.keys():  # an outermost bin in OpenVLA's code
        with pytest.raises(ActionTokenError, match=f"word {word} stands where a number belongs"):
            head.actions(torch.tensor([word]))


def taught_batch(policy: Policy, episodes: int = 2) -> StepBatch:
    """OpenVLA's two training examples in one lane: two episodes of a step each, or one of two."""
    examples = golden_json("tokenization")["training_examples"]
    inputs = policy.transforms.inputs([observation(case["task"], case["picture"]) for case in examples])
    count = len(examples)
    nothing = torch.zeros(1, count, 0, dtype=torch.long)
    return StepBatch(
        inputs=inputs.map(lambda x: x[None]),
        actions=torch.tensor([case["action"] for case in examples])[None, :, None],
        action_valid=torch.ones(1, count, 1, dtype=torch.bool),
        is_first=torch.tensor([[True, episodes == 2]]),
        valid=torch.ones(1, count, dtype=torch.bool),
        t=torch.zeros(1, count, dtype=torch.long),
        episode_key=torch.zeros(1, count, dtype=torch.long),
        noise_seed=torch.zeros(1, count, dtype=torch.long),
        plan=nothing, last_plan=nothing, question=nothing, answer=nothing,
    )  # fmt: skip


def test_the_loss_and_its_gradients_are_the_published_ones(policy: Policy) -> None:
    expected = golden("train_step")
    model = policy.model
    model.zero_grad()
    loss, _ = model.loss(taught_batch(policy), model.initial_memory(1))
    close(loss, expected["loss"])
    loss.backward()
    named = dict(model.backbone.vlm.named_parameters())
    for name, norm in golden_json("grad_norms").items():
        gradient = named[name].grad
        if norm is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name
    for name, gradient in expected.items():
        if name.startswith("grad:"):
            close(named[name[5:]].grad, gradient, 1e-4 * float(np.abs(gradient).max()))


def test_statistics_and_terms_come_from_the_files(policy: Policy) -> None:
    contract = policy.contract
    assert contract.gripper == "environment"
    assert policy.transforms.contract.gripper == "open_is_one"
    assert contract.state == "none"
    assert not contract.clipped
    assert set(policy.transforms.conventions.mixed) == {"toy_bridge", "toy_libero_no_noops"}


def test_the_user_tells_what_the_files_do_not(openvla: Path, tmp_path: Path) -> None:
    config = ImportConfig(openvla, tmp_path / "p", "toy_bridge", terms={"gripper": "environment", "control_hz": 5})
    assert imported(config).transforms.contract.gripper == "environment"
    assert imported(config).contract.control_hz == 5
    with pytest.raises(ValueError, match="griper"):
        imported(replace(config, terms={"griper": "environment"}))


@pytest.mark.parametrize(("size", "layout"), [(8, "hand"), (9, "hand_padded")])
def test_the_size_of_liberos_state_tells_whether_openvla_padded_it(
    openvla: Path, tmp_path: Path, size: int, layout: str
) -> None:
    content = json.loads((HERE / "model" / "dataset_statistics.json").read_text())["toy_libero_no_noops"]
    rows = {row: [*numbers[:6], *[0] * (size - 8), *numbers[6:]] for row, numbers in content["proprio"].items()}
    (tmp_path / "s.json").write_text(json.dumps({"libero_spatial_no_noops": content | {"proprio": rows}}))
    made = imported(ImportConfig(openvla, tmp_path / "p", statistics=tmp_path / "s.json"))
    assert made.transforms.conventions.recorded is not None
    assert made.transforms.conventions.recorded.state == layout
    assert fine_tuning(made, tmp_path / "p")["data"].get("padded_state", False) == (size == 9)


@pytest.mark.parametrize(
    ("columns", "layout", "padded"),
    [
        ("7 numbers", "other", False),
        ("padded", "other", True),
        ("8 numbers", "unknown", False),
        ("padding elsewhere", "unknown", False),
        ("zeros alone", "unknown", False),
        ("none", "other", False),
    ],
)
def test_bridges_statistics_tell_whether_openvla_padded_its_state(
    openvla: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, columns: str, layout: str, padded: bool
) -> None:
    """What is neither Bridge's own state nor OpenVLA's is said, not guessed."""
    random = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    states = {
        "7 numbers": random[:, :7],
        "padded": padded_before_gripper(random[:, :7]),
        "8 numbers": random,
        "padding elsewhere": np.insert(random[:, :7], 2, 0, axis=1),
        "zeros alone": 0 * random,
        "none": random[:, :0],
    }[columns]
    statistics = Statistics.compute([random[:, :7]], [states])
    statistics.save(tmp_path / "s.json", "bridge_orig")
    made = imported(ImportConfig(openvla, tmp_path / "p", statistics=tmp_path / "s.json"))
    recorded = made.transforms.conventions.recorded
    assert recorded is not None
    assert (recorded.state, recorded.state_size) == (layout, states.shape[1])
    assert fine_tuning(made, tmp_path / "p")["data"].get("padded_state", False) == padded
    assert ("neither Bridge's own, of 7, nor OpenVLA's" in caplog.text) == (layout == "unknown")


@pytest.mark.parametrize(("key", "cameras"), [("libero_spatial", ("agentview",)), ("bridge_orig", ("primary",))])
def test_a_known_dataset_tells_cameras_and_pictures(
    openvla: Path, tmp_path: Path, key: str, cameras: tuple[str, ...]
) -> None:
    content = json.loads((HERE / "model" / "dataset_statistics.json").read_text())
    (tmp_path / "statistics.json").write_text(json.dumps({f"{key}_no_noops" if "libero" in key else key:
                                                          content["toy_libero_no_noops"]}))  # fmt: skip
    made = imported(ImportConfig(openvla, tmp_path / "p", key, statistics=tmp_path / "statistics.json"))
    assert made.transforms.cameras == cameras
    assert made.contract.pictures.orientation == (
        "mirrored" if "libero" in key else made.contract.pictures.orientation
    )
    assert made.transforms.contract.gripper == "open_is_one"
    assert made.contract.control_hz == (20 if "libero" in key else made.contract.control_hz)


@pytest.mark.parametrize("name", ["bank", "gru", "lstm", "window", "skill", "chain", "kv", "latent"])
def test_a_memory_that_begins_closed_changes_nothing(
    policy: Policy, openvla: Path, tmp_path: Path, name: str
) -> None:
    """Bit for bit, at every step of an episode; those that feed the backbone cannot begin closed."""
    kind = MemoryConfig.get_choice_class(name)
    memory = kind([GRUMemoryConfig(), BankMemoryConfig()]) if name == "chain" else kind()
    config = ImportConfig(openvla, tmp_path / "p", "toy_libero_no_noops", model=ImportedModelConfig(memory))
    remembering = imported(config)
    state, plain, same = remembering.initial_memory(3), policy.initial_memory(3), []
    for t in range(5):
        cases = TASKS[t % 3 : t % 3 + 3]
        several = [observation(case["task"], case["picture"], t) for case in cases]
        answers, state = remembering.act(several, state)
        same.append(np.array_equal(answers, policy.act(several, plain)[0]))
    assert all(same) or name in ("kv", "latent")
    if name not in ("kv", "latent"):
        remembering.model.zero_grad()
        loss, _ = remembering.model.loss(taught_batch(remembering, 1), remembering.initial_memory(1))
        loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in remembering.model.memory.parameters()), (
            "it can open"
        )


def test_a_lora_adapter_is_merged(openvla: Path, tmp_path: Path) -> None:
    expected = golden("lora")
    merged = imported(ImportConfig(openvla, tmp_path / "p", "toy_bridge", adapter=HERE / "lora_adapter"))
    inputs = merged.transforms.inputs(
        [observation("Pick up the black bowl and place it on the plate", "picture_0")]
    )
    output = merged.model.backbone(inputs)
    assert inputs.input_ids[0, : len(expected["input_ids"][0])].tolist() == expected["input_ids"][0].tolist()
    close(output.features.perception, expected["patch_features"])
    for i, hidden in enumerate(output.hidden_states):
        close(hidden, expected[f"hidden_{i}"])
    for case in golden_json("lora")["generated"]:
        answer = act(merged, [observation(case["task"], case["picture"])])[0, 0]
        np.testing.assert_allclose(answer[:6], case["action"][:6], rtol=0, atol=1e-6)


def test_one_vision_tower(single_tower: Path, tmp_path: Path) -> None:
    expected = golden("single_tower")
    config = ImportConfig(single_tower, tmp_path / "p", reasoning_tokens=20)
    ecot = imported(config)
    backbone = ecot.model.backbone
    inputs = ecot.transforms.inputs([observation("close the Drawer", "picture_0")])
    ids = torch.from_numpy(expected["input_ids"])
    inputs = replace(inputs, input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool))
    output = backbone(inputs)
    close(torch.cat(backbone.vlm.vision_backbone.pixels(inputs.images), 1), expected["pixel_values"], 1e-6)
    close(output.features.perception, expected["patch_features"])
    close(output.hidden_states[-1], expected["hidden_4"])
    written = backbone.write(inputs, len(expected["generated_ids"]))
    assert written[0].tolist() == expected["generated_ids"].tolist()
    assert np.isfinite(act(ecot, [observation("close the drawer", "picture_0")])).all()


def test_the_action_stands_at_the_end_of_the_reasoning(single_tower: Path, tmp_path: Path) -> None:
    """ECoT's answer ends in `</s>`, here made likeliest behind the ninth word; the action stands before it."""
    model = imported(ImportConfig(single_tower, tmp_path / "p", reasoning_tokens=20)).model
    backbone, policy = model.backbone, imported(ImportConfig(single_tower, tmp_path / "p"))
    inputs = policy.transforms.inputs([observation("close the drawer", "picture_0")])
    ids = torch.tensor([policy.model.backbone.tokenize("close the drawer")[:-1]])
    inputs = replace(inputs, input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        words = backbone.write(inputs, 9)
        state = backbone(inputs.with_prompt(torch.cat([ids, words], 1))).hidden_states[-1][0, -1]
        row = state / state.square().sum() * (backbone.logits(state).max() + 1)
        backbone.network.language_model.lm_head.weight[2] = row
        assert backbone.write(inputs, 20)[0].tolist() == [*words[0].tolist(), *[-1] * 11]
        said = model.sample(backbone(inputs).features)
    assert model.head.words(said).tolist() == words[:, 2:].tolist()


def speaks(policy: Policy, word: int) -> None:
    """Makes a word the likeliest of all, whatever was said."""
    head = policy.model.backbone.network.language_model.lm_head

    def louder(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1000 * torch.nn.functional.one_hot(torch.tensor(word), logits.shape[-1])

    head.register_forward_hook(louder)


@pytest.mark.parametrize("word", [2, 400])
def test_other_words_never_become_an_action(openvla: Path, single_tower: Path, tmp_path: Path, word: int) -> None:
    """OpenVLA's code would read them as the outermost bin; what is written is the likeliest number instead."""
    seen = [observation("close the Drawer", "picture_0")]
    policy = imported(ImportConfig(openvla, tmp_path / "p", "toy_bridge"))
    before = act(policy, seen)
    speaks(policy, word)
    np.testing.assert_array_equal(act(policy, seen), before)
    at_once = imported(ImportConfig(openvla, tmp_path / "p", "toy_bridge", parallel=True))
    before = act(at_once, seen)
    speaks(at_once, word)
    np.testing.assert_array_equal(act(at_once, seen), before)
    ecot = imported(ImportConfig(single_tower, tmp_path / "p", reasoning_tokens=20))
    speaks(ecot, word)
    inputs = ecot.transforms.inputs(seen)
    head = ecot.model.head
    assert isinstance(head, OpenVLATokensHead)
    with torch.no_grad():
        words = head.write(replace(ecot.model.backbone(inputs).features, language=ecot.model.backbone))[0].tolist()
    behind = words[: words.index(2)] if 2 in words else words
    assert all(31744 <= said < 32000 for said in behind[-7:])
    assert len(words) == 28
    if word == 400:
        assert words[:20] == [400] * 20, "it reasons as long as it may, and then it acts"


def test_logits_that_are_not_finite_are_refused(openvla: Path, tmp_path: Path) -> None:
    policy = imported(ImportConfig(openvla, tmp_path / "p", "toy_bridge"))
    with torch.no_grad():
        policy.model.backbone.network.language_model.lm_head.weight[5] = torch.nan
    with pytest.raises(ActionTokenError, match="logits of its action tokens are not finite"):
        act(policy, [observation("close the Drawer", "picture_0")])


def test_the_vicuna_prompt(single_tower: Path, tmp_path: Path) -> None:
    known = golden_json("tokenization")["training_example_v01_prompt"]
    backbone = imported(ImportConfig(single_tower, tmp_path / "p")).model.backbone
    assert backbone.tokenize(known["task"]) == known["input_ids"][:-8]
    reasons = imported(ImportConfig(single_tower, tmp_path / "q", reasoning_tokens=20)).model.backbone
    asked = next(case for case in golden_json("tokenization")["encode"] if case["text"].endswith("TASK:"))
    ids = reasons.tokenize("close the drawer")
    assert ids[-3:] == asked["ids"][-3:], "no space behind it"


@pytest.mark.parametrize("name", ["none", "gru", "bank", "kv", "latent"])
def test_words_are_written_as_they_are_taught(openvla: Path, tmp_path: Path, name: str) -> None:
    """What is decoded step by step, the memory carried along, is the likeliest in one teacher-forced pass too."""
    memory = MemoryConfig.get_choice_class(name)()
    config = ImportConfig(openvla, tmp_path / "p", "toy_libero_no_noops", model=ImportedModelConfig(memory))
    model = imported(config).model
    torch.manual_seed(1)
    for parameter in model.memory.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    batch = taught_batch(imported(config), 1)
    state, actions = model.initial_memory(1), []
    for k in range(2):
        action, state = model.act(batch.inputs.map(lambda x, k=k: x[:, k]), state, batch.t[:, k])
        actions.append(action)
    batch = replace(batch, actions=torch.stack(actions, 1))
    with torch.no_grad():
        features, _, _ = model.memory.window(model.backbone, batch, model.initial_memory(1))
        words = model.head.words(batch.actions.flatten(0, 1))
        features = replace(features.map(lambda x: x.flatten(0, 1)), language=model.backbone)
        states, recalled = model.head.heard(features, words[:, :-1])
    assert model.backbone.logits(states + recalled).argmax(-1).tolist() == words.tolist()


def test_the_policy_stands_by_itself(openvla: Path, tmp_path: Path) -> None:
    """Neither the checkpoint nor the place that it was written to is needed again."""
    main(ImportConfig(openvla, tmp_path / "here", "toy_bridge"))
    before = act(Policy.load(tmp_path / "here"), [observation("open", "picture_0")])
    (tmp_path / "here").rename(tmp_path / "there")
    again = Policy.load(tmp_path / "there")
    np.testing.assert_array_equal(act(again, [observation("open", "picture_0")]), before)
    again.save(tmp_path / "third")
    np.testing.assert_array_equal(act(Policy.load(tmp_path / "third"), [observation("open", "picture_0")]), before)
    assert json.loads((tmp_path / "third" / "policy.json").read_text())["model"]["backbone"]["type"] == "prismatic"


def test_what_a_probe_reads_is_differentiable(policy: Policy) -> None:
    model = policy.model
    inputs = policy.transforms.inputs([observation(case["task"], case["picture"]) for case in TASKS])
    with torch.no_grad():
        said = model.sample(model.backbone(inputs).features)
    features = model.backbone(inputs).features
    expected = model.expected(features)
    assert expected.shape == said.shape
    assert (expected.abs() < 1).all()
    model.zero_grad()
    expected.square().sum().backward()
    assert model.backbone.network.language_model.model.layers[0].self_attn.v_proj.weight.grad.any()
    model.zero_grad()


@pytest.mark.parametrize("name", ["none", "bank", "kv", "latent", "prompt"])
def test_half_precision(openvla: Path, tmp_path: Path, name: str) -> None:
    """bfloat16 and float16 weights, and float32 weights in bfloat16 arithmetic: it acts and is trained."""
    memory = MemoryConfig.get_choice_class(name)()
    for dtype in ("bfloat16", "float16", "float32"):
        config = ImportConfig(
            openvla, tmp_path / "p", "toy_libero", dtype=dtype, model=ImportedModelConfig(memory)
        )
        policy = imported(config)
        assert {p.dtype for p in policy.model.backbone.parameters()} == {getattr(torch, dtype)}
        batch = taught_batch(policy, 1)
        if name == "prompt":
            words = policy.model.backbone.tokenize_text("PLAN: open")
            plan = torch.full((1, 2, policy.model.plan_tokens), -1)
            plan[..., : len(words)] = torch.tensor(words)
            batch = replace(batch, plan=plan, last_plan=torch.full_like(plan, -1))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
            state = policy.initial_memory(2)
            for t in range(2):
                _, state = policy.act([observation("close", name, t) for name in pictures()], state)
            loss, _ = policy.model.loss(batch, policy.model.initial_memory(1))
        loss.backward()
        assert loss.isfinite()
