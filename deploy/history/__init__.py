"""Results of `slimdiff bench` over time."""
