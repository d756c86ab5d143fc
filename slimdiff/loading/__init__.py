"""Loading: opening what a user names, once it has been looked through."""
