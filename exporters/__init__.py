"""ONNX graphs, ONNX Runtime, TensorRT(-RTX) engines, parity and latency of slim and dense diffusion models."""

import lazy_loader

# `__init__.pyi` lists the names. torch and diffusers take seconds, so a name is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
