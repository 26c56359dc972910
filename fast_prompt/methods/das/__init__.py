"""DAS, dynamic architecture skipping."""

from fast_prompt.methods.das.config import DASConfig, set_skipped, skipped_now

__all__ = ["DASConfig", "set_skipped", "skipped_now"]
