"""Where a checkpoint's files lie: what a local folder and a repository on the Hub have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qz import MissingInput
from qz.formats.malformed import Malformed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from qz.formats.files.promised import Promised

PIPELINE_INDEX = "model_index.json"
PIECE = 4 << 20
"""Bytes read or written at once: small enough for a cache, large enough for the cost of the calls to vanish."""


class Range(NamedTuple):
    """Bytes ``[start, stop)`` of one file."""

    file: str
    start: int
    stop: int


class Folder(Protocol):
    """Files to read by offset. Thread-safe. Names are plain file names inside this folder, and those ``include``d."""

    location: str
    """How to show it to the user: a path, or ``repo_id@commit``."""
    allow_pickle: bool
    """Whether the user lets pickled weights be read where there are no others."""
    named_file: str | None
    """The file in it that the user named, if it was a file."""
    only: str | None
    """The one file that counts, if a file was named and not the folder."""
    promised: Promised | None
    """What its files have to be, if a record says so: whatever is read is compared with that."""

    def sizes(self) -> Mapping[str, int]:
        """Every regular file's name and size in bytes."""
        ...

    def include(self, name: str, files: Iterable[str]) -> None:
        """Count files of the folder ``name`` inside among this one's, as ``NAME/FILE``: those of them that are there.

        Raises what ``subfolder`` raises.
        """
        ...

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``, or raise MissingInput, MalformedInput (short file) or IOFailed."""
        ...

    def announce(self, ranges: Sequence[Range]) -> None:
        """Tell, once, every range that will be read and in which order, so that it can be fetched ahead."""
        ...

    def is_verified(self, file: str) -> bool:
        """Whether all that was read of ``file`` so far is known to be right; raises MalformedInput if it is not."""
        ...

    def check(self) -> None:
        """After the last read: raise MalformedInput if a file changed meanwhile or its hash is not the promised one."""
        ...

    def identity(self) -> dict[str, Any]:
        """What makes this input the same input: commit, or size and time of every file that was read (JSON values)."""
        ...

    def subfolder(self, name: str) -> Folder:
        """The folder of one component; MissingInput, naming those there are, if it does not exist."""
        ...

    def subfolders(self) -> Sequence[str]:
        """Names of the folders inside."""
        ...

    def give_up(self) -> None:
        """Reads that wait for something end with an error, now and later. Files stay open."""
        ...

    def close(self) -> None: ...


def read_file(folder: Folder, file: str, limit: int) -> bytes:
    """A whole small file; of one larger than ``limit`` bytes only ``limit + 1``, which is enough to refuse it."""
    size = folder.sizes().get(file)
    if size is None:
        folder.read_into(file, 0, memoryview(bytearray(1)))  # raises the reason why it is not among the files
        raise MissingInput(f"{folder.location}/{file} does not exist.")
    buffer = bytearray(min(size, limit + 1))
    folder.read_into(file, 0, memoryview(buffer))
    return bytes(buffer)


def read_at(folder: Folder, file: str) -> Callable[[int, int], bytearray]:
    """A function of offset and length that gives these bytes of ``file``, as parsers of headers take it."""

    def read(offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        folder.read_into(file, offset, memoryview(buffer))
        return buffer

    return read


def in_pieces(
    read: Callable[[int, memoryview], None], size: int, progress: Callable[[int], None] | None = None
) -> Iterator[memoryview]:
    """``size`` bytes, each piece in the buffer that the next one overwrites; ``read`` fills it from an offset on.

    ``progress`` is given the bytes of a piece when the next one is asked for. Raises what ``read`` raises.
    """
    buffer = memoryview(bytearray(min(PIECE, size)))
    for start in range(0, size, PIECE):
        piece = buffer[: min(PIECE, size - start)]
        read(start, piece)
        yield piece
        if progress is not None:
            progress(len(piece))


def place_of(folder: Folder, name: str) -> tuple[Folder, str]:
    """Where the file ``name`` lies, which may be in folders of ``folder``, and its name there.

    Raises what ``Folder.subfolder`` raises.
    """
    parent, _, base = name.rpartition("/")
    return (folder.subfolder(parent) if parent else folder), base


def read_text(folder: Folder, file: str, limit: int) -> str:
    """A small file for people, such as a card, whatever its encoding; Malformed if longer than ``limit`` bytes."""
    data = read_file(folder, file, limit)
    if len(data) > limit:
        where = f"{folder.location}/{file}"
        raise Malformed(
            "too-large", f"{where} is longer than {limit:,} bytes, too large for such a file. Move it away."
        )
    return data.decode("utf-8-sig", errors="replace")


def is_pipeline(folder: Folder) -> bool:
    """Whether a folder is a whole pipeline, not one model: diffusers reads the index, and no config.json beside it."""
    return folder.named_file is None and PIPELINE_INDEX in folder.sizes()
