"""A Hub on 127.0.0.1: what the huggingface_hub client asks of huggingface.co, answered as huggingface.co does.

Repositories with commits, branches, pull requests and visibility; model info, tree (paged), paths-info, resolve with
redirects to a CDN of two hosts (signed links, ranges), reading over Xet, whoami, create, settings, preupload, LFS
batch, basic and multipart upload, verify, commit. ``rules`` lists what it plays, with sources. ``Fault`` makes any
request of a kind fail in a chosen way; ``requests``, ``bytes_out`` and ``bytes_in`` count per kind.
``python -m hub_server FOLDER`` serves a directory of repositories.
"""

from hub_server.client import connected, connected_forks
from hub_server.contents import Blob, Entry, Repo
from hub_server.faults import Answer, Fault
from hub_server.server import OWNER, READER, HubServer

__all__ = ["OWNER", "READER", "Answer", "Blob", "Entry", "Fault", "HubServer", "Repo", "connected", "connected_forks"]
