"""What a person sees of a build: a bar on a terminal, else a line now and then."""

import sys
import time

from tqdm import tqdm

SECONDS = 30  # between lines


class Progress:
    """total: rows to come, None where nobody knows. Used as a context, it ends the bar."""

    def __init__(self, total):
        self.total, self.rows, self.refused = total, 0, 0
        self.begin = self.said = time.monotonic()
        self.bar = tqdm(total=total, unit="row", unit_scale=True, dynamic_ncols=True) if sys.stderr.isatty() else None

    def add(self, rows, refused):
        """Count rows that have been read, and those of them that were refused."""
        self.rows += rows
        self.refused += refused
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.refused} refused", refresh=False)
            self.bar.update(rows)
        elif time.monotonic() - self.said > SECONDS:
            self.said = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self):
        seconds = self.said - self.begin
        text = f"{self.rows} rows  {self.rows / seconds:.0f} rows/s  {self.refused} refused"
        if self.total is None:
            return text
        left = seconds * (self.total - self.rows) / max(1, self.rows)
        return f"{text}  {tqdm.format_interval(left)} left of {self.total} rows"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
