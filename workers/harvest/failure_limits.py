"""When a run gives up: counters of workers that came to nothing, one after the other. Pure."""

LOADS_IN_A_ROW = 8
"""Actors that may die or hang while they load, with none that got through in between."""
USELESS_AT_FIRST, USELESS_IN_A_ROW = 3, 8
"""Workers that have finished nothing and may be replaced, one after the other, because units raise in them: in a run
that has finished nothing yet, and later. Then it is not the units."""


class HarvestFailed(RuntimeError):
    """The harvest cannot go on, or has left units out. What is committed stays."""


class FailureLimits:
    """Count failures that follow one another; raise HarvestFailed at the limit."""

    def __init__(self) -> None:
        self._loads = self._useless = 0
        self._most_useless = USELESS_AT_FIRST

    def reset_loads(self) -> None:
        self._loads = 0

    def count_settled_unit(self, *, finished: bool) -> None:
        """It is finished, or set aside."""
        self._useless = 0
        if finished:
            self._most_useless = USELESS_IN_A_ROW

    def count_failed_load(self, why: str) -> None:
        self._loads += 1
        if self._loads >= LOADS_IN_A_ROW:
            raise HarvestFailed(
                f"{self._loads} harvesters died one after the other before they held the model (out of memory?); the "
                f"last: {why}. Committed units are safe; start again to go on"
            )

    def count_useless_worker(self, why: str) -> None:
        """It was replaced because units raised in it, and had finished none."""
        self._useless += 1
        if self._useless >= self._most_useless:
            raise HarvestFailed(
                f"{self._useless} harvesters one after the other failed at every unit they began and none was finished,"
                f" so it is not the units; the last: {why}. What is committed stays; put that right and start again"
            )
