"""What commands show: one-line failures, and progress as bars on a terminal or as lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol, TextIO

import typer

LINE_EVERY_S = 3.0


def stop(*lines: str, code: int = 1) -> NoReturn:
    """End the command with these lines on stderr."""
    for line in lines:
        sys.stderr.write(f"quantserve: {line}\n" if code == 1 else f"{line}\n")
    raise typer.Exit(code)


def duration(seconds: float) -> str:
    """In the largest unit that says enough: "40 s", "12 min", "1.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True, slots=True)
class Step:
    """How far one thing is. `total` 0: nobody knows yet."""

    stage: str
    done: int
    total: int
    unit: str
    eta_s: float | None = None

    @property
    def share(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def amount(self) -> str:
        left = f", about {duration(self.eta_s)} left" if self.eta_s else ""
        if self.unit == "%":
            return ""
        if self.unit == "bytes":
            return f"{self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB{left}"
        return f"{self.done}/{self.total} {self.unit}{left}".rstrip()


class Progress(Protocol):
    def show(self, name: str, step: Step) -> None: ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...


class Lines:
    """One line when a stage begins, and then one every few seconds."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.out = out
        self.clock = clock
        self.last: dict[str, tuple[str, float, str]] = {}

    def show(self, name: str, step: Step) -> None:
        stage, at, said = self.last.get(name, ("", 0.0, ""))
        if stage == step.stage and self.clock() - at < LINE_EVERY_S:
            return
        share = f" {step.share:.0%}" if step.done and step.total else ""
        amount = f" ({step.amount})" if share and step.amount else ""
        line = f"{name}: {step.stage}{share}{amount}"
        self.last[name] = (step.stage, self.clock(), line)
        if line != said:
            self.say(line)

    def say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


class Bars:
    """A bar for each name, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.tasks: dict[str, int] = {}

    def show(self, name: str, step: Step) -> None:
        from rich.progress import TaskID

        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=1.0, amount="")
        self.bars.update(
            TaskID(self.tasks[name]),
            description=f"{name} {step.stage}",
            total=1.0 if step.total else None,
            completed=step.share,
            amount=step.amount if step.total else "",
        )

    def say(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars where stderr is a terminal, else lines on stderr."""
    if not sys.stderr.isatty():
        yield Lines(sys.stderr)
        return
    bars = Bars()
    with bars.bars:
        yield bars
