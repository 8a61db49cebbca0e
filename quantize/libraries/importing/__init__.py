"""Importing the libraries: lean, without optional packages that break, and closed to code that a config names."""
