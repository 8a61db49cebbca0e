"""Removes secrets from text before it is shown: tokens, and signatures that make a link work for everyone."""

from __future__ import annotations

import os
import re

TOKENS = re.compile(
    r"\b(?:hf|api)_(?:[a-z]+_)?[A-Za-z0-9]{20,}(?:[._-][\w-]+)*"
    r"|\beyJ[\w-]{10,}(?:\.[\w-]+){1,2}"
    r"|(?i:(?<=Bearer )|(?<=Authorization: Basic ))(?!hf_\*)[\w.~+/=-]+"
    r"|(?<=\"accessToken\":\")[^\"]+|(?<=\"access_token\":\")[^\"]+"
)
"""Of the Hub, JSON Web Tokens, and what stands in a header for either."""
PARAMETERS = re.compile(
    r"(?i)(?:(?<![a-z0-9_])|(?<=%3f)|(?<=%26))((?:signature|credential|security-?token|policy|key-pair-id|sig|access_?token|id_token|token"
    r"|awsaccesskeyid|googleaccessid|api_?key)(?:=|%3d))(?!\*\*\*)(?:(?!%26)[^&\s\"'\\<>])+"
)
"""In an address, also in one that is a part of another."""
USERS = re.compile(r"(?<=://)[^/\s@\"']+:[^/\s@\"']+(?=@)")
"""Name and password before a host."""
NAMED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
"""Variables of the environment that hold one."""


def redact(text: str) -> str:
    """``text`` without secrets, those of the environment and whatever looks like one."""
    for name in NAMED:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:
            text = text.replace(value, "hf_***")
    return USERS.sub("***", PARAMETERS.sub(r"\1***", TOKENS.sub("hf_***", text)))
