"""An express lane: where all slots are taken by long answers, a short one need not wait for the end of one.

The long answer that has least to compute again gives its slot up. The lane stays open for a while after each
use, so that a stream of short requests costs one such loss and not one each.
"""

from server.engine.sequence import Sequence

FEWEST = 4  # slots of an engine that has a lane
SHORT_PROMPT, SHORT_ANSWER = 256, 32  # tokens at most
LONG_ANSWER = 16  # tokens so far: an answer that has just begun is not interrupted
OPEN_STEPS = 64


class Lane:
    """Time is counted in steps."""

    def __init__(self, slots: int) -> None:
        self._exists = slots >= FEWEST
        self._until = 0
        self._user: Sequence | None = None

    @property
    def busy(self) -> bool:
        return self._user is not None and self._user.slot is not None

    def keeps_a_slot(self, step: int) -> bool:
        """Whether one slot is to stay free for the next user."""
        return step < self._until and not self.busy

    def next_user(self, waiting: list[Sequence]) -> Sequence | None:
        """The first short one of those that are the most important; they are sorted by rank."""
        able = [one for one in waiting if not one.held]
        if not self._exists or self.busy or not able:
            return None
        most = able[0].request.priority
        return next((one for one in able if one.request.priority == most and is_short(one)), None)

    def open(self, step: int) -> None:
        self._until = step + OPEN_STEPS

    def enter(self, user: Sequence) -> None:
        self._user = user


def is_short(sequence: Sequence) -> bool:
    """What is left to be done of it, while it waits."""
    size = len(sequence.tokens)
    return size <= SHORT_PROMPT and sequence.limit - size <= SHORT_ANSWER


def interruptible(sequence: Sequence, user: Sequence) -> bool:
    """Not a more important answer, nor a reproducible one, which would be computed again token by token."""
    if sequence.params.reproducible or sequence.request.priority < user.request.priority:
        return False
    return len(sequence.tokens) - sequence.prompt_tokens >= LONG_ANSWER
