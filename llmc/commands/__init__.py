"""One file for each command of the command line: its options, and the call behind it."""
