"""What runs beside and inside a Triton server: copied into the model repository, so nothing here imports slimdiff."""
