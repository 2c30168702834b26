"""R23: the wall clock jumps by a day, there and back: no time-out fires, only `created` changes."""

import os
import threading
import time
from pathlib import Path

import httpx

from tests.faults.servers import COMPLETIONS, ENDLESS, REPO, SHORT, serving, toy_models, until

DAY_S = 86_400


def test_a_clock_that_jumps_by_a_day(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    path = os.pathsep.join((str(Path(__file__).with_name("jumping")), str(REPO)))
    text = toy_models(tmp_path, parallel=4, keep_alive="10m")
    with serving(tmp_path, text, PYTHONPATH=path, FAULTS_CLOCK=str(clock)) as server:
        engines, seen = server.children(), list[str]()

        def read() -> None:
            body = {**ENDLESS, "max_tokens": 3000, "stream": True, "timeout": 300}
            with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=120) as got:
                for part in got.iter_text():
                    seen.append(part[-200:])

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: len(seen) > 0, 30)
        for offset in (DAY_S, -DAY_S, 0):
            clock.write_text(str(offset))
            answer = server.post(COMPLETIONS, {**SHORT, "timeout": 60})
            assert answer.status_code == 200, answer.text
            assert abs(answer.json()["created"] - (time.time() + offset)) < 60
            assert server.http.get("/ready").status_code == 200
        reader.join(120)
        assert seen[-1].endswith("data: [DONE]\n\n")
        assert "error" not in "".join(seen)
        assert server.children() == engines
