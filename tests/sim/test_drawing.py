"""The light robot looks like its collision meshes and moves like itself."""

import xml.etree.ElementTree as ET

from ipvla.sim.libero import configure

MJCF = """<mujoco>
  <asset>
    <mesh name="fine" file="fine.stl"/><mesh name="coarse" file="coarse.stl"/><mesh name="cup" file="c.stl"/>
  </asset>
  <worldbody><body name="link">
    <geom name="gripper0_finger_visual" type="mesh" mesh="fine" material="steel" group="1"
      contype="0" conaffinity="0"/>
    <geom name="robot0_link_collision" type="mesh" mesh="coarse" group="0" rgba="0 0.5 0 1"/>
    <geom name="cup_visual" type="mesh" mesh="cup" group="1"/>
    <geom name="robot0_pad" type="box" size="1 1 1" group="0"/>
  </body></worldbody>
</mujoco>"""


def test_fine_meshes_go_and_coarse_ones_show(cache_dir):
    configure(cache_dir)
    from ipvla.sim.drawing import draw_collision_meshes

    root = ET.fromstring(draw_collision_meshes(MJCF))
    assert [mesh.get("name") for mesh in root.iter("mesh")] == ["coarse", "cup"]
    visual, collision, cup, pad = root.iter("geom")
    assert visual.get("name") == "gripper0_finger_visual"
    assert "mesh" not in visual.attrib
    assert visual.get("group") == "3"
    assert (visual.get("contype"), visual.get("conaffinity")) == ("0", "0")
    assert collision.get("mesh") == "coarse"
    assert collision.get("group") == "1"
    assert (cup.get("mesh"), cup.get("group")) == ("cup", "1"), "only the robot is drawn otherwise"
    assert pad.attrib == {"name": "robot0_pad", "type": "box", "size": "1 1 1", "group": "0"}
