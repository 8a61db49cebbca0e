"""What the two processes say to each other: lengths and bytes."""

from __future__ import annotations

from typing import IO

LARGEST = 1 << 30
READY = b"ready"


def send(stream: IO[bytes], data: bytes) -> None:
    """Write one message."""
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """None where the other one has ended, or does not talk like this."""
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > LARGEST:
        return None
    data = stream.read(length)
    return data if len(data) == length else None
