"""Trusted Publishers: GitHub's endpoint for identity tokens, and the Hub's exchange of one for a token of one scope.

Sources: huggingface/hub-docs, docs/hub/trusted-publishers.md; huggingface_hub 2.4, _oidc.py.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hub_server.faults import Answer
from hub_server.request import Request

if TYPE_CHECKING:
    from hub_server.server import HubServer

GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"


@dataclass
class Ci:
    """A CI job: the secret it may ask GitHub with, what it got, and the resources that trust it on the Hub."""

    hub: HubServer
    trusted: set[str]
    secret: str = field(default_factory=lambda: secrets.token_hex(8))
    minted: dict[str, str] = field(default_factory=dict)
    """Identity token → audience."""
    life: int = 3600
    """Seconds that an exchanged token is good for."""

    @property
    def environment(self) -> dict[str, str]:
        """What GitHub sets for a job with ``permissions: id-token: write``."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.hub.url}/github/id-token?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.secret,
        }


class TrustedPublishing(Request):
    ROUTES: ClassVar = [
        ("hub", "GET", r"/github/id-token", "id_token"),
        ("hub", "POST", r"/oauth/token", "oauth_token"),
    ]

    def id_token(self, body: bytes) -> None:
        ci = self.server.hub.ci
        if ci is None or self.headers.get("Authorization") != f"Bearer {ci.secret}":
            raise Answer(401, message="Unauthorized")
        token = f"eyJ.{secrets.token_hex(8)}"
        ci.minted[token] = self.query["audience"][0]
        self.json({"value": token})

    def oauth_token(self, body: bytes) -> None:
        hub, wanted = self.server.hub, json.loads(body)
        if (wanted.get("grant_type"), wanted.get("subject_token_type")) != (GRANT, ID_TOKEN):
            self.json({"error": "invalid_request", "error_description": "unsupported grant"}, 400)
            return
        resource, ci = wanted.get("resource", ""), hub.ci
        if ci is None or ci.minted.get(wanted.get("subject_token", "")) != hub.url or resource not in ci.trusted:
            said = {"error": "invalid_grant", "error_description": f"No trusted publisher of {resource} matches"}
            self.json(said, 400)
            return
        token = f"hf_jwt_{secrets.token_hex(12)}"
        # A repository's token writes that one and reads no other; a user's reads what is gated and writes nothing.
        hub.users[token] = {
            "name": resource.split("/")[0],
            "orgs": [],
            "role": "write" if "/" in resource else "read",
            "only": resource if "/" in resource else None,
            "ends": hub.now() + ci.life,
        }
        self.json({"access_token": token, "token_type": "bearer", "expires_in": ci.life, "scope": "one"})
