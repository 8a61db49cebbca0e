"""Touches disk and Hub: safetensors, config, shards, staging."""
