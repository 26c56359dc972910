"""What the methods must know of an architecture."""

from fast_prompt.models.attention import AttentionSite, Projections, find_attention_sites

__all__ = ["AttentionSite", "Projections", "find_attention_sites"]
