"""The `mohge` command: one file for each of its commands, imported when it runs."""
