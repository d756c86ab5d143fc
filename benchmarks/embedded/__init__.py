"""The embedded model from its data to its card: `slimdiff.embedded` holds what comes out of this."""
