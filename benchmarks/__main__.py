"""``make bench``: every benchmark that needs no GPU, one after the other, as ratios."""

from __future__ import annotations

import subprocess
import sys

for script in ("kernels", "whole", "dequantize", "inspect", "hub", "push", "start"):
    print(f"\n== python -m benchmarks.{script}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{script}"], check=True)
