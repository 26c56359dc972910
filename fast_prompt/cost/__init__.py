"""What a method costs a model: multiply-adds and parameters, counted from real modules without memory."""

from fast_prompt.cost.comparison import comparisons
from fast_prompt.cost.counting import count_macs, count_parameters
from fast_prompt.cost.methods import Settings, counted_methods, methods_for
from fast_prompt.cost.rows import Row, count
from fast_prompt.models.subject import COUNTED, Subject, find_subject

__all__ = [
    "COUNTED",
    "Row",
    "Settings",
    "Subject",
    "comparisons",
    "count",
    "count_macs",
    "count_parameters",
    "counted_methods",
    "find_subject",
    "methods_for",
]
