"""Engines: who holds the weights and how gradients are shared. One interface, `Engine`; a module an engine."""

from harness.engines.base import Engine, start

__all__ = ["Engine", "start"]
