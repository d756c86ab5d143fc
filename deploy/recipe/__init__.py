"""The recipe: every setting of a build."""
