"""The record of a checkpoint, and what may stand in it."""
