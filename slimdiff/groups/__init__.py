"""The groups: which modules share an inner dimension, and where they are in a denoiser."""
