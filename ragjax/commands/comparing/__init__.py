"""Subcommands about whole runs beside each other."""
