"""Talks to people: options, tables, JSON, progress, errors as text and exit codes."""
