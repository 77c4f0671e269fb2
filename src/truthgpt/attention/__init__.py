"""Attention backends and how they reach transformers."""
