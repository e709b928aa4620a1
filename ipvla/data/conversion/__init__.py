"""Datasets from one format to another: in parts, resumable, compared with the source before they appear."""

from ipvla.data.conversion.comparison import Comparison
from ipvla.data.conversion.plan import ConversionConfig, Part, Plan
from ipvla.data.conversion.work import Conversion, convert_part, tasks_of_part

__all__ = ["Comparison", "Conversion", "ConversionConfig", "Part", "Plan", "convert_part", "tasks_of_part"]
