"""The skill library: when it is asked, and that episodes never write to it."""

import torch

from ipvla.models.memory import SkillMemoryConfig
from tests.models.memory.episodes import BACKBONE, build, changed, features, run

ONCE = SkillMemoryConfig(slots=6, top_k=2, key=5)


def test_the_skill_of_the_first_step_is_kept_for_the_episode() -> None:
    module, x = build(ONCE), features(1, 6)
    skill = run(module, x)[1]["skill"]
    torch.testing.assert_close(skill, run(module, x.map(lambda v: v[:, :1]))[1]["skill"])
    assert torch.equal(skill, run(module, changed(x, 3))[1]["skill"]), "later events are not remembered"
    assert not torch.allclose(skill, run(module, changed(x, 0))[1]["skill"])


def test_refresh_looks_up_anew_every_n_policy_steps() -> None:
    module, x = build(SkillMemoryConfig(slots=6, top_k=2, key=5, refresh=3)), features(1, 6)
    plain = run(module, x)[0].cognition
    other = run(module, changed(x, 3))[0].cognition
    assert torch.equal(plain[:, :3], other[:, :3])
    assert not torch.isclose(plain[:, 3:], other[:, 3:]).all(-1).any()
    assert torch.equal(plain, run(module, x)[0].cognition)
    assert torch.equal(run(module, changed(x, 4))[0].cognition[:, 5], plain[:, 5]), "no look-up is due at 4"


def test_a_rollout_leaves_the_library_as_it_was() -> None:
    module = build(ONCE)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert before["keys"].shape == (6, 5)
    assert before["values"].shape[0] == 6
    with torch.inference_mode():
        run(module, features(3, 20))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_only_the_chosen_skills_learn() -> None:
    module = build(SkillMemoryConfig(slots=50, top_k=2, key=5))
    run(module, features(1, 4))[0].cognition.square().sum().backward()
    for parameter in (module.keys, module.values):
        assert int(parameter.grad.any(-1).sum()) == 2


def test_it_is_almost_silent_before_training() -> None:
    torch.manual_seed(0)
    module, x = ONCE.build(BACKBONE), features(4, 5)
    torch.nn.init.zeros_(module.out.bias)
    assert (run(module, x)[0].cognition - x.cognition).abs().max() < 0.1
