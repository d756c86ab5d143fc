"""Quality of slim models: `python -m benchmarks.quality`."""
