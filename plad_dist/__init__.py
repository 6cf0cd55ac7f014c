"""Distil large language models by preference, on clusters."""

__version__ = "0.2.0"
