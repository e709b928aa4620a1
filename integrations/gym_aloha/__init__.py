"""gym-aloha's two tasks without the three pictures of 640 x 480 that it draws in every control step.

Importing this registers `ipvla/AlohaTransferCube-v0` and `ipvla/AlohaInsertion-v0`: gym-aloha's own physics,
tasks, rewards and seeds. Observations are the joints alone; a picture is drawn when `render` asks for it.
"""

from gymnasium.envs.registration import register

_ENTRY_POINT = "integrations.gym_aloha.environment:DrawnOnDemand"

for _name, _task in (("AlohaTransferCube", "transfer_cube"), ("AlohaInsertion", "insertion")):
    register(id=f"ipvla/{_name}-v0", entry_point=_ENTRY_POINT, kwargs={"task": _task})
