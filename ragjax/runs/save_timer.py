"""When it is time to save again, agreed between the processes."""

from __future__ import annotations

import time

from ragjax.parallel.processes import broadcast_from_process_zero

MOST = 32  # steps without a look: they may become slower than they were


class SaveTimer:
    """Tells after which step `train.save_minutes` have passed since the last save, by the clock of process 0.

    To agree costs the processes a collective. So they agree only on when to look again: after half of the steps for
    which there is time, at the pace since the last save, or after `MOST`.
    """

    def __init__(self, minutes: float | None, step: int) -> None:
        self.minutes = minutes
        self.restart(step)

    def restart(self, step: int) -> None:
        """The state after this step has been saved."""
        self._saved, self._step, self._look = time.monotonic(), step, step + 1

    def due(self, step: int) -> bool:
        """Whether to save after this step; every process asks after each."""
        if self.minutes is None or step < self._look:
            return False
        passed = time.monotonic() - self._saved
        left, pace = 60 * self.minutes - passed, passed / (step - self._step)
        wait = broadcast_from_process_zero(0 if left <= 0 else min(1 + int(left / pace / 2), MOST))
        self._look = step + wait
        return wait == 0
