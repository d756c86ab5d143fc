"""Calibration: second moments of what flows through a denoiser."""
