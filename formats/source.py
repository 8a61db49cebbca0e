"""From what the user typed to a folder: a local path, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qz import HubUnreachable, MalformedInput, MissingInput, PermissionRefused
from qz.formats.files.links import followed
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import quoted
from qz.formats.output.recorded.promises import hold_to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qz.formats.checkpoint.adapter_file import AdapterFile
    from qz.formats.files.folder import Folder

_REPO_FILE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<path>(?:/[^/@]+)+)?(?:@(?P<revision>[^@\s]+))?", re.ASCII
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_LINK = (
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/(?P<path>[^?#]+?))?)?/?(?:[?#].*)?"
)
"""A page or a file of a model's repository, as a browser shows its address."""
_ONE_FILE = (".safetensors", ".gguf")
_NO_WEIGHTS = re.compile(
    r".*\.(?:json|md|txt|ya?ml|py|jinja|model|onnx|h5|msgpack|tflite|mlmodel|nemo|zip|tar|gz|7z)", re.IGNORECASE
)
"""Files of a model's folder, and models in other forms and archives, by their names."""

LONGEST_REPO_ID = 200
"""Characters; the Hub has 96 for each of the two names."""
LONGEST_PATH = 1000
"""Of a file inside a repository."""


def open_source(
    source: str, subfolder: str | None = None, revision: str | None = None, *, cached: bool = True
) -> Folder:
    """The folder that ``source`` names; MissingInput if it is neither a local folder nor a repository id.

    A path that exists is local; one that begins with ``.``, ``/`` or ``~``, or has more than one slash, cannot be
    anything else. ``cached``: whether a repository may come from the Hub cache if the Hub does not answer.
    """
    path = local_path(source)
    folder: Folder
    if path is not None:
        folder = LocalFolder(path, shared_links=True)
    elif _REPO_ID.fullmatch(source) and len(source) <= LONGEST_REPO_ID:
        from qz.formats.hub.opening import open_repo

        try:
            folder = open_repo(source, revision=revision, cached=cached)
        except (HubUnreachable, MissingInput) as error:
            from huggingface_hub import is_offline_mode

            # Names without an owner are folders, but for a few old repositories: offline, there is no such thing.
            nothing = "/" not in source and is_offline_mode()
            kind = MissingInput if nothing else type(error)
            raise kind(f"{error} There is no local folder {source} either.") from error
    else:
        shown = quoted(source) if len(source) > LONGEST_REPO_ID or not source.strip() else source
        form = _as_options(source) or "USER/NAME"
        raise MissingInput(f"{shown} does not exist. Give a local folder, or a repository on the Hub as {form}.")
    return enter(folder, subfolder)


def _as_options(source: str) -> str | None:
    """How an address on the Hub, or a name with a revision or a path, is written for qz; None for anything else."""
    import shlex
    from urllib.parse import unquote

    found = re.fullmatch(_LINK, source, re.ASCII) or _REPO_FILE.fullmatch(source)
    if found is None or len(source) > LONGEST_PATH:
        return None
    path, revision = (unquote(found[each] or "").strip("/") for each in ("path", "revision"))
    parts = [found["repo"]]
    if revision not in ("", "main"):
        parts += ["--revision", revision]
    if path:
        parts += ["--file" if path.lower().endswith(_ONE_FILE) else "--subfolder", path]
    return shlex.join(parts)


def local_path(source: str) -> Path | None:
    """The path that ``source`` names, if something is there; ``~`` and ``~user`` are homes.

    Raises PermissionRefused where that cannot be seen: it must not be taken for a repository.
    """
    path = os.path.expanduser(source)
    try:
        os.lstat(path)
    except PermissionError as error:
        raise PermissionRefused(f"{source}: permission denied. Check the permissions of that path.") from error
    except (OSError, ValueError):
        return None
    return Path(path) if source else None


def enter(folder: Folder, subfolder: str | None) -> Folder:
    """The folder inside ``folder`` that ``--subfolder`` names; ``folder`` itself where it names none."""
    for name in subfolder.strip("/").split("/") if subfolder else ():
        folder = folder.subfolder(name)
    return folder


class OpenedSource(NamedTuple):
    """A source as it was named, and opened: ``folder`` is what ``subfolder`` names of ``root``, or ``root`` itself."""

    location: str
    subfolder: str | None
    root: Folder
    folder: Folder
    file: str | None = None
    """The one file of ``folder`` that is the source, where it is not the folder."""

    @property
    def notes(self) -> tuple[str, ...]:
        return notes_of(self.root)


def notes_of(*folders: Folder) -> tuple[str, ...]:
    """What the user should know of where their files come from: that the Hub did not answer, and its cache did."""
    return tuple(note for folder in folders if (note := getattr(folder, "note", None)) is not None)


@contextmanager
def opened(
    location: str,
    subfolder: str | None = None,
    revision: str | None = None,
    *,
    cached: bool = True,
    allow_pickle: bool = False,
    file: str | None = None,
    held: bool = True,
) -> Iterator[OpenedSource]:
    """The source, closed afterwards, with ``cached`` as in ``open_source``, and ``allow_pickle`` as of a ``Folder``.

    ``file``: the path of one file in it that is the source; a local one may be the ``location`` itself. ``held``: what
    is read of an output of qz has to be what its record says, or MalformedInput is raised.

    Raises MissingInput, MalformedInput for a file that by its name is none of weights, and what the Hub answers.
    """
    root: Folder
    path = local_path(location)
    if path is not None and path.is_file() and file is None:
        path = followed(path)
        root = LocalFolder(path.parent, shared_links=True)
        file = path.name
    else:
        root = open_source(location, None, revision, cached=cached)
    root.allow_pickle = allow_pickle
    folder = root
    try:
        if held:
            hold_to_record(root, "/".join(filter(None, ((subfolder or "").strip("/"), file))) if file else None)
        *inside, name = (file or "").strip("/").split("/")
        folder = enter(root, "/".join(filter(None, (subfolder, *inside))) or None)
        if name:
            if name not in folder.sizes():
                there = ", ".join(quoted(each, 60) for each in folder.sizes() if each.endswith(".safetensors"))
                raise MissingInput(f"{folder.location} has no file {quoted(name)}. There are: {there or 'none'}.")
            if _NO_WEIGHTS.fullmatch(name):
                raise MalformedInput(
                    f"{folder.location}/{name} is no file of weights. Name the folder of the model, such as "
                    f"{folder.location}, or a .safetensors or .gguf file."
                )
            if name.lower().endswith(".gguf") and not _is_denoiser(folder, name):
                folder.named_file, name = name, ""
            else:
                folder.only = name
        yield OpenedSource(location, subfolder, root, folder, name or None)
    finally:
        folder.close()
        root.close()


def _is_denoiser(folder: Folder, name: str) -> bool:
    from qz.formats.checkpoint.gguf import is_denoiser

    return is_denoiser(folder, name)


@contextmanager
def opened_loras(names: Iterable[str], *, cached: bool = True) -> Iterator[tuple[AdapterFile, ...]]:
    """LoRAs named as REPO|FOLDER|FILE[:SCALE], opened in their order; closed afterwards.

    A repository may be followed by the path of a file in it and by @REVISION. ``cached`` as in ``open_source``. Raises
    what opening raises.
    """
    with ExitStack() as stack:
        yield tuple(_opened_lora(name, stack, cached=cached) for name in names)


def _opened_lora(name: str, stack: ExitStack, *, cached: bool) -> AdapterFile:
    from qz.formats.checkpoint.adapter_file import open_adapter, parse_scale

    location, scale = parse_scale(name, exists=local_path(name) is not None)
    path = local_path(location)
    if path is not None:
        path = followed(path)
        parent = LocalFolder(path if path.is_dir() else path.parent, shared_links=True)
        stack.callback(parent.close)
        return open_adapter(parent, None if path.is_dir() else path.name, path.name, scale)
    match = _REPO_FILE.fullmatch(location)
    if match is None or len(location) > LONGEST_REPO_ID + LONGEST_PATH:
        raise MissingInput(
            f"--lora {quoted(location, 200)} does not exist. Give a local file or folder, or a repository on the Hub "
            "as USER/NAME, USER/NAME/FILE.safetensors or USER/NAME@REVISION, each with :SCALE if it is not 1."
        )
    root = folder = open_source(match["repo"], None, match["revision"], cached=cached)
    stack.callback(root.close)
    *inside, file = (match["path"] or "").strip("/").split("/")
    if file and not file.endswith(".safetensors"):
        inside, file = [*inside, file], ""
    folder = enter(root, "/".join(inside) or None)
    if folder is not root:
        stack.callback(folder.close)
    return open_adapter(folder, file or None, "/".join([match["repo"], *inside]), scale)


def default_output(source: str, subfolder: str | None, suffix: str) -> Path:
    """The repository's or folder's name, the subfolder and the method, joined by dashes.

    A new folder here; beside the source where the source is the working directory, or one around it.
    """
    path = local_path(source)
    real = followed(path) if path is not None else None
    # The name that the user sees: of a link its own, not its target's.
    name = Path(os.path.abspath(path)).name if path is not None else source.split("/")[-1]
    name = re.sub(r"\.gguf\Z", "", name, flags=re.IGNORECASE)
    name = name.removesuffix(".safetensors") if real is not None and real.is_file() else name
    output = "-".join([name or "model", *(subfolder.strip("/").split("/") if subfolder else ()), suffix])
    here = Path.cwd()
    return real.parent / output if real is not None and real in (here, *here.parents) else Path(output)


def download(folder: Folder, files: Iterable[str], progress: Callable[[str, int], None] | None = None) -> None:
    """Fill the Hub cache with ``files`` of a repository's folder, to be read from there; a local folder has them.

    ``progress(file, bytes)`` is called from several threads when a file is there.
    """
    if not isinstance(folder, LocalFolder):
        from qz.formats.hub.repository import HubFolder

        assert isinstance(folder, HubFolder)
        folder.download(files, progress)


def save_memory(folder: Folder) -> None:
    """Fetch less of a repository ahead of its readers: something else needs the memory."""
    if not isinstance(folder, LocalFolder):
        from qz.formats.hub.repository import HubFolder

        assert isinstance(folder, HubFolder)
        folder.narrow = True


def is_restricted(folder: Folder) -> bool:
    """Whether it is a repository that not everyone may read: private or gated."""
    return bool(getattr(folder, "private", False) or getattr(folder, "gated", False))
