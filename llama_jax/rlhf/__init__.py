"""Reinforcement learning from human feedback (Touvron et al., arXiv:2307.09288)."""
