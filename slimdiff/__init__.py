"""Slim diffusion models in closed form, guided by their activations, without a gradient step."""

import lazy_loader

# `__init__.pyi` lists the names. torch and diffusers take seconds, so a name is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
