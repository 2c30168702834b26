"""`python -m tests.clients PYTHON`: checks.py, run by that Python, and vercel/checks.mjs, run by node.

Both against a server on the bundled model. What node needs is installed in that Python's environment.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.serving import own_server

HERE = Path(__file__).parent
VERCEL = ("checks.mjs", "package.json")


def run_python(python: str, url: str) -> int:
    # litellm otherwise asks another machine for prices
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [python, str(HERE / "checks.py"), url, "tiny-chat"]
    return subprocess.run(command, check=False, env=environ).returncode


def run_node(folder: Path, url: str) -> int:
    """`folder` keeps what npm installs, from one run to the next."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        print("vercel ai sdk: not checked, since node and npm are not installed")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in VERCEL:
        shutil.copy(HERE / "vercel" / name, folder)
    install = [npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
    if subprocess.run(install, check=False, cwd=folder).returncode:
        print("vercel ai sdk: failed, since npm could not install its packages")
        return 1
    return subprocess.run([node, "checks.mjs", url, "tiny-chat"], check=False, cwd=folder).returncode


def main(python: str) -> int:
    with own_server("models/tiny-chat", "q4_k_m", 1024, 2) as own:
        url = f"{own.url}/v1"
        codes = (run_python(python, url), run_node(Path(python).parents[1] / "node", url))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
