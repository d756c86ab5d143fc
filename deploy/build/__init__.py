"""The build: stages from a recipe to a verdict."""
