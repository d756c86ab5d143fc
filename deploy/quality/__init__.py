"""Metrics of images that people use, on their own checkpoint, with intervals, and the folders that other tools take."""
