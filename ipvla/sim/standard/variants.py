"""Objects that LIBERO-PRO adds: those of LIBERO with other meshes and colours, registered where LIBERO finds them.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from typing import Any, Final

from libero.libero.envs.base_object import OBJECTS_DICT, VISUAL_CHANGE_OBJECTS_DICT

#: Category in task files, which is its name among the assets too -> the object of LIBERO that it looks like.
VARIANTS: Final = {
    "bigger_akita_black_bowl": "akita_black_bowl",
    "bigger_alphabet_soup": "alphabet_soup",
    "black_bowl": "akita_black_bowl",
    "blue_ketchup": "ketchup",
    "brown_rack": "wine_rack",
    "green_bbq_sauce": "bbq_sauce",
    "green_butter": "butter",
    "green_chocolate_pudding": "chocolate_pudding",
    "red_basket": "basket",
    "red_cream_cheese": "cream_cheese",
    "red_salad_dressing": "salad_dressing",
    "white_bottle": "wine_bottle",
    "yellow_cabinet": "wooden_cabinet",
    "yellow_milk": "milk",
    "yellow_moka_pot": "moka_pot",
    "yellow_plate": "plate",
    "yellow_stove": "flat_stove",
    "yellow_tomato_sauce": "tomato_sauce",
}


def register_variants() -> None:
    """Makes them known to LIBERO; those that it knows already stay as they are."""
    for category, original in VARIANTS.items():
        if category not in OBJECTS_DICT:
            OBJECTS_DICT[category] = _variant(category, OBJECTS_DICT[original])
            if original in VISUAL_CHANGE_OBJECTS_DICT:
                VISUAL_CHANGE_OBJECTS_DICT[category] = OBJECTS_DICT[category]


def _variant(category: str, original: Any) -> type:
    def initialise(self: Any, name: str = category, obj_name: str = category, **given: Any) -> None:
        original.__init__(self, name, obj_name, **given)

    # LIBERO derives a category's name from the class's.
    name = "".join(word.capitalize() for word in category.split("_"))
    return type(name, (original,), {"__init__": initialise})
