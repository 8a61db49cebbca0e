"""What an interrupted run says about what it leaves for the next one."""

from __future__ import annotations

from qz.counted import counted


def kept_in_words(finished: int, begun: int) -> str:
    """``finished``, ``begun``: how many shards the journal has as whole, and in part."""
    if not finished and not begun:
        return "No shard was finished, so nothing is left behind: the same command starts over."
    whole = f"{finished} finished {'shard is' if finished == 1 else 'shards are'} kept" if finished else ""
    part = f"most of what was done of {counted(begun, 'other shard' if finished else 'shard')}" if begun else ""
    told = f"{whole}, and {part}" if finished and begun else whole or f"{part[0].upper()}{part[1:]} is kept"
    return f"{told}: run the same command again to continue, or start over with --no-resume."
