"""The command line: flags in, settings and a call out. Nothing heavy is imported before a command needs it."""
