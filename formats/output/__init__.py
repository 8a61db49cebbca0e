"""Outputs in the making: staged, journaled, verified, renamed into place."""
