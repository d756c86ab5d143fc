"""ONNX graphs, ONNX Runtime, TensorRT(-RTX) engines, parity and latency of slim and dense diffusion models."""
