"""How the episodes of each dataset become those that policies train on."""

from ipvla.data.standards.generic import StandardConfig
from ipvla.data.standards.registry import STANDARDS, adjusted, standard_for, standard_of
from ipvla.data.standards.standard import Standard

__all__ = ["STANDARDS", "Standard", "StandardConfig", "adjusted", "standard_for", "standard_of"]
