"""One module per command, and a line in the table of `deploy.cli.app`, which says what a module has."""
