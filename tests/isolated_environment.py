"""The tests' environment does not depend on the caller's: neither variables nor what lies in the home directory."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile

KEPT = {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR", "USER", "LOGNAME"} | {
    "HTTPS_PROXY",  # test_real_weights asks pip for published models
    "https_proxy",
    "REQUESTS_CA_BUNDLE",
}
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBeTCCAR+gAwIBAgIUdt5w6vy3iIUoPcn5XW7ux32RFmkwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGbm9ib2R5MCAXDTI2MTEyNzEwMTM1NloYDzIxMjYxMTAzMTAx
MzU2WjARMQ8wDQYDVQQDDAZub2JvZHkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAS8UtCyfZhdoStwhRcAqS9Vgd5/yM8I/kfPngGuuywzs6vfDRpvcW0teTNvEcHq
HaUCmnbKy/DMRB715n0q03e/o1MwUTAdBgNVHQ4EFgQUe2r4vm72e8csFy5ubAfN
OmzOTUswHwYDVR0jBBgwFoAUe2r4vm72e8csFy5ubAfNOmzOTUswDwYDVR0TAQH/
BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiB74oqYvG0M6oDtRQSgE8WTJzJ2Sn54
m6iC7ixQl8dOjQIhAPi0eB7znKbxdKCcO1WQcj+1TABuN3Ydout/hVcugTkI
-----END CERTIFICATE-----
"""
"""Who vouches for servers: nobody. Those of the tests need none, and each session of the Hub's client would take 35 ms
to read whom the system trusts; but there must be one."""
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
KEPT_FAMILIES = ("PYTEST_", "QZ_TEST_", "PIP_", "OMP_", "CUDA_", "NVIDIA_", "COVERAGE_")
SET = {
    "LANG": "C.UTF-8",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


def enter() -> None:
    """Leave the caller's environment, before any library reads it. Workers get the one that their parent made."""
    if "QZ_TEST_HOME" not in os.environ:
        os.environ |= {f"QZ_TEST_{name}": os.environ[name] for name in CERTIFICATES if name in os.environ}
    for name in set(os.environ) - KEPT:
        if not name.startswith(KEPT_FAMILIES):
            del os.environ[name]
    os.environ |= SET
    sys.dont_write_bytecode = False  # or each of hundreds of processes compiles all modules of qz
    if "QZ_TEST_HOME" not in os.environ:
        os.environ["QZ_TEST_HOME"] = tempfile.mkdtemp(prefix="qz-home-")
        atexit.register(shutil.rmtree, os.environ["QZ_TEST_HOME"], ignore_errors=True)
        with open(f"{os.environ['QZ_TEST_HOME']}/authority.pem", "w") as file:
            file.write(AUTHORITY)
    os.environ["HOME"] = os.environ["QZ_TEST_HOME"]
    os.environ["SSL_CERT_FILE"] = f"{os.environ['HOME']}/authority.pem"


def with_certificates() -> dict[str, str]:
    """The environment with the caller's certificates, for what does use the network."""
    own = {name: os.environ[f"QZ_TEST_{name}"] for name in CERTIFICATES if f"QZ_TEST_{name}" in os.environ}
    return {name: value for name, value in os.environ.items() if name not in CERTIFICATES} | own
