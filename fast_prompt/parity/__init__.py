"""Parity: every op on every backend against the float64 reference, forward and every gradient."""

from fast_prompt.parity.problem import DTYPES, Problem, compare, evaluate
from fast_prompt.parity.runner import Report, Row, cases_of, run

__all__ = ["DTYPES", "Problem", "Report", "Row", "cases_of", "compare", "evaluate", "run"]
