"""Whole pipelines: planned component by component, within a size or a loss, and carried out under one commit."""
