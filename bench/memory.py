"""Anonymous memory of processes, sampled as that of our trainer is: mapped weights do not count."""

import threading
import time


def anonymous_bytes(process: int | str = "self") -> int:
    try:
        with open(f"/proc/{process}/status") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # It ended meanwhile.
    return 0


class PeakMemory:
    """The largest of what `measure` returns, every so many seconds."""

    def __init__(self, measure=anonymous_bytes, seconds=0.01):
        self.peak = 0
        self.measure = measure
        self.seconds = seconds
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            self.peak = max(self.peak, self.measure())
            time.sleep(self.seconds)
