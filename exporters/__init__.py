"""ONNX graphs, ONNX Runtime, TensorRT(-RTX) engines, parity and latency of slim and dense diffusion models."""

from slimdiff.lazy import attach

# `__init__.pyi` lists the names. torch and diffusers take seconds, so a name is imported when it is first used.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
