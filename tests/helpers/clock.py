"""Time that passes only when a test says so."""


class Clock:
    """In place of time.perf_counter: its seconds are `now`, which is the test's to raise. Each look at it takes a
    millisecond, so that loops that wait for a time end."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now
