"""Parity: every op on every backend against the float64 reference, forward and every gradient."""

from fast_prompt.parity.problem import DTYPES, Problem, compare, evaluate
from fast_prompt.parity.runner import OPS, Report, Row, run

__all__ = ["DTYPES", "OPS", "Problem", "Report", "Row", "compare", "evaluate", "run"]
