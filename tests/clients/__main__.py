"""`python -m tests.clients PYTHON`: checks.py, run by that Python against a server on the bundled model."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.serving import own_server

CHECKS = Path(__file__).with_name("checks.py")

if __name__ == "__main__":
    with own_server("models/tiny-chat", "q4_k_m", 1024, 2) as own:
        # litellm otherwise asks another machine for prices
        environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        command = [sys.argv[1], str(CHECKS), f"{own.url}/v1", "tiny-chat"]
        sys.exit(subprocess.run(command, check=False, env=environ).returncode)
