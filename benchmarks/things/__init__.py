"""Scenes of named things in two styles: the second, harder benchmark model, from its data to its figures."""
