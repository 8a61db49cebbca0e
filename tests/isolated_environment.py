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
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
}
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
    for name in set(os.environ) - KEPT:
        if not name.startswith(KEPT_FAMILIES):
            del os.environ[name]
    os.environ |= SET
    sys.dont_write_bytecode = False  # or each of hundreds of processes compiles all modules of qz
    if "QZ_TEST_HOME" not in os.environ:
        os.environ["QZ_TEST_HOME"] = tempfile.mkdtemp(prefix="qz-home-")
        atexit.register(shutil.rmtree, os.environ["QZ_TEST_HOME"], ignore_errors=True)
    os.environ["HOME"] = os.environ["QZ_TEST_HOME"]
