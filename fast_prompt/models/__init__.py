"""What the methods must know of an architecture."""

from fast_prompt.models.attention import PROVEN, AttentionSite, Projections, find_attention_sites
from fast_prompt.models.visual import VisualEncoder

__all__ = ["PROVEN", "AttentionSite", "Projections", "VisualEncoder", "find_attention_sites"]
