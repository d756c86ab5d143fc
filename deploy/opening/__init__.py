"""Opening what a user names, and saying what it is."""
