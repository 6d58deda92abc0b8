"""The command `dpt`: `main` finds a subcommand, each in a file of its own name; `arguments` has what they take."""
