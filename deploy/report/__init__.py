"""Pages for people: the report, the frontier, the trend."""
