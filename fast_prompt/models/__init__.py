"""What the methods must know of an architecture."""

from fast_prompt.models.attention import PROVEN, AttentionSite, Projections, find_attention_sites

__all__ = ["PROVEN", "AttentionSite", "Projections", "find_attention_sites"]
