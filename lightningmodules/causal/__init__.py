"""Causal language model: the exact-likelihood baseline of the token rooms, and the scorer of their samples."""
