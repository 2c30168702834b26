"""`python -m tests.hostile SCHEMATHESIS [SOURCE]`: schemathesis over /openapi.json, odd schemas, the mutants.

SCHEMATHESIS is its command; SOURCE a model, by default the bundled one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.serving import own_server
from tests.hostile.mutants import main

HERE = Path(__file__).parent
KEY = "sk-hostile"
END = re.compile(r"=+ .* in [\d.]+s =+")  # schemathesis' last line
BAD = re.compile("failure|error|Warnings fail|No checks|Traceback")
EXIT_S = 30
EXAMPLES = 100  # of each operation, besides those at every bound: more than 2,000 cases in all


def described(command: str, url: str) -> int:
    """All checks but positive_data_acceptance; schemathesis.toml says why."""
    run = [command, "--config-file", str(HERE / "schemathesis.toml"), "run", f"{url}/openapi.json"]
    run += ["--header", f"Authorization: Bearer {KEY}", "--max-examples", str(EXAMPLES)]
    environ = {**os.environ, "SCHEMATHESIS_HOOKS": "retry", "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(run, env=environ, cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        if END.fullmatch(line.strip()):
            break
    return _ended(process, good=not BAD.search(line))


def _ended(process: "subprocess.Popen[str]", *, good: bool) -> int:
    """It says that it is done, and then may wait for a thread of its own that never is."""
    try:
        return process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return int(not good)


def odd_schemas(command: str, url: str, model: str) -> int:
    """With the Python that has schemathesis, and hypothesis-jsonschema beside it."""
    run = [str(Path(command).with_name("python")), str(HERE / "schemas.py"), url, model, KEY]
    return subprocess.run(run, check=False).returncode


if __name__ == "__main__":
    os.environ |= {"QUANTSERVE_API_KEYS": "sk-user", "QUANTSERVE_ADMIN_KEYS": KEY}
    source = sys.argv[2] if len(sys.argv) > 2 else "models/tiny-chat"
    with own_server(source, "q4_k_m", 512, 4) as own:
        model = own.model.partition(":")[0]
        failed = max(described(sys.argv[1], own.url), odd_schemas(sys.argv[1], own.url, model))
        attack = ["--base", own.url, "--model", model, "--key", KEY, "--pid", str(own.pid)]
        sys.exit(max(failed, main(attack)))
