"""Benchmarks: contenders timed in turn on the same numbers, beside what this machine could do at best."""

from fast_prompt.bench.overhead import Overhead, measure
from fast_prompt.bench.runner import OPS, PASSES, Progress, Report, Row, Setting, check_shape, run

__all__ = ["OPS", "PASSES", "Overhead", "Progress", "Report", "Row", "Setting", "check_shape", "measure", "run"]
