"""Planning: one rank per site under a budget."""
