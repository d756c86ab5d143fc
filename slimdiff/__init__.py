"""Slim diffusion models in closed form, guided by their activations, without a gradient step."""

from slimdiff.lazy import attach

# `__init__.pyi` lists the names. torch and diffusers take seconds, so a name is imported when it is first used.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
