"""Validation: whether an artifact computes what its model does."""
