"""Signatures of whole folders, made and checked by the OpenSSF's model-signing package, which is optional."""

from __future__ import annotations

import base64
import importlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qz import MissingInput, Unsupported, UsageError
from qz.formats.files.regular_file import read_regular
from qz.formats.json_files import MAX_BYTES
from qz.formats.malformed import Malformed
from qz.formats.output.recorded.statement import SIGNATURE

BESIDE = ("README.md", ".cache", SIGNATURE)
"""What is there on the Hub, or in a download of it, beside what is signed."""


MOST_KEY_BYTES = 1 << 16


def sign(folder: Path, private_key: Path, left_out: Iterable[str]) -> bytes:
    """The signature of all files in ``folder`` but those ``left_out``, by an elliptic-curve key in PEM."""
    package = _package()
    hashing = package.hashing.Config().set_ignored_paths(paths=[*BESIDE, *left_out])
    with tempfile.TemporaryDirectory(prefix="qz-") as place:
        signature = Path(place, SIGNATURE)
        signer = _with_key(package.signing.Config(), "use_elliptic_key_signer", private_key=private_key)
        signer.set_hashing_config(hashing).sign(folder, signature)
        return signature.read_bytes()


def require_signed(folder: Path, public_key: Path) -> frozenset[str]:
    """The names of the signed files; Malformed, saying what differs, unless the signature in ``folder`` is by that key
    and of these files."""
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise MissingInput(f"{folder} has no {SIGNATURE}: it is not signed, or by a file elsewhere.")
    if (size := signature.stat().st_size) > MAX_BYTES:
        raise Malformed("signature-invalid", f"{signature} has {size:,} bytes, too many for a signature.")
    verifier = _with_key(_package().verifying.Config(), "use_elliptic_key_verifier", public_key=public_key)
    try:
        verifier.verify(folder, signature)
        return _signed(signature)
    except Exception as error:  # the package and its dependencies raise anything for an untrusted file
        why = str(error) or type(error).__name__
        raise Malformed("signature-invalid", f"{signature} does not sign this folder by this key: {why}") from error


def _signed(signature: Path) -> frozenset[str]:
    """Names of the files that a signature is of, which was found right: what it leaves out may be anything."""
    payload = json.loads(base64.b64decode(json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]))
    predicate = payload.get("predicate") or {}
    names = (each["name"] for each in predicate.get("resources") or payload["subject"])
    in_pieces = (predicate.get("serialization") or {}).get("method") == "shards"
    return frozenset(name.rsplit(":", 2)[0] if in_pieces else name for name in names)


def _with_key(config: Any, use: str, **key: Path) -> Any:
    [(name, path)] = key.items()
    try:
        read_regular(path, MOST_KEY_BYTES)  # the package would wait for a FIFO, and read a device without end
        return getattr(config, use)(**key)
    except FileNotFoundError:
        raise MissingInput(f"{path} does not exist. Name the key's file.") from None
    except (OSError, ValueError, TypeError) as error:
        kind, why = name.replace("_", " "), error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{path} is not a {kind} that model-signing takes ({why}): an elliptic-curve key in PEM, without a "
            "password. `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one."
        ) from None


def _package() -> Any:
    names: Sequence[str] = ("model_signing.hashing", "model_signing.signing", "model_signing.verifying")
    try:
        for name in names:
            importlib.import_module(name)
        return importlib.import_module("model_signing")
    except ImportError as error:
        raise Unsupported(
            f"Signatures need the OpenSSF's model-signing package ({error}): pip install 'qz-cli[sign]'."
        ) from None
