"""One module per command: `add_parser(subparsers)` says what it takes, `run(args)` does it and gives the exit code."""
