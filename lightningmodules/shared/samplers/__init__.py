"""Samplers that more than one room may use."""
