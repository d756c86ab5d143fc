"""Slimming: from a dense denoiser, its statistics and a plan to the slim denoiser."""
