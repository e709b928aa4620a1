"""The table, the go-lamp, the light and the camera, as MJCF without texture files."""

from __future__ import annotations

from ipvla.sim.recall.scene import LAMP_OFF_RGBA, TABLE_TOP_M

_THICKNESS_M = 0.05
#: The arm stands behind the table's edge: from a longer table its elbow locks before it reaches the far buttons.
_SIZE_M = (0.86, 1.2, _THICKNESS_M)


def table_size_m() -> tuple[float, float, float]:
    """Full length, width and thickness of the table."""
    return _SIZE_M


def arena_mjcf() -> str:
    """MJCF text of the arena. No shadows: they cost more than everything else that is drawn."""
    half = " ".join(str(side / 2) for side in _SIZE_M)
    lamp = " ".join(map(str, LAMP_OFF_RGBA))
    top = _THICKNESS_M / 2
    return f"""<mujoco model="recall_arena">
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".9 .9 1" rgb2=".5 .6 .7" width="32" height="32"/>
    <texture name="tiles" type="2d" builtin="checker" rgb1=".55 .5 .45" rgb2=".5 .45 .4" width="64" height="64"/>
    <material name="floor" texture="tiles" texrepeat="4 4" texuniform="true" reflectance="0"/>
  </asset>
  <worldbody>
    <geom name="floor" type="plane" size="3 3 0.125" material="floor" group="1" condim="3"/>
    <body name="table" pos="0 0 {TABLE_TOP_M - top}">
      <geom name="table_collision" type="box" size="{half}" group="0" friction="1 0.005 0.0001"
            contype="1" conaffinity="0"/>
      <geom name="table_visual" type="box" size="{half}" group="1" rgba="0.55 0.5 0.44 1"
            contype="0" conaffinity="0"/>
      <geom name="go_lamp" type="box" size="0.015 0.06 0.012" pos="0.13 0 {top + 0.01}" group="1" rgba="{lamp}"
            contype="0" conaffinity="0"/>
      <site name="table_top" pos="0 0 {top}" size="0.001" rgba="0 0 0 0"/>
    </body>
    <light name="sun" directional="true" castshadow="false" pos="1 1 4" dir="0.2 -0.15 -1"
           diffuse="0.45 0.45 0.45" ambient="0.1 0.1 0.1" specular="0.1 0.1 0.1"/>
    <camera name="agentview" mode="fixed" pos="0.42 0 1.42" xyaxes="0 1 0 -1 0 1" fovy="46"/>
  </worldbody>
</mujoco>
"""
