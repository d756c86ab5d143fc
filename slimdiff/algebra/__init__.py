"""The algebra: decompositions, eliminations and least squares, of tensors alone."""
