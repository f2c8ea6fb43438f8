"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

import sys
import time

from tqdm import tqdm

# The parts of a loss that a line shows, beside masked_ and spectrum_ with a spectrum's name.
PARTS = ("coord", "se3_ddm", "emgp", "emgp_level", "frad", "contrast", "property", "energy", "forces")


class Progress:
    """total: steps of the run. start: steps done already. enabled: on the rank that speaks."""

    def __init__(self, total, start, enabled):
        self.total, self.start, self.enabled = total, start, enabled
        self.begin = time.monotonic()
        self.bar = None
        if enabled and sys.stdout.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", file=sys.stdout, dynamic_ncols=True)

    def report(self, step, values):
        """Show a step: its loss and the parts of it, the speed, the time left.

        values: name -> number, of them the parts of the loss and loss, molecules_per_second, atoms_per_second,
        data_wait (share of the time), mfu (of the machine's matrix products, where known), learning_rate, memory_gib.
        """
        if not self.enabled:
            return
        spent = time.monotonic() - self.begin
        left = spent / max(1, step - self.start) * (self.total - step)
        names = ["loss", *(name for name in values if name in PARTS or name.startswith(("masked_", "spectrum_")))]
        losses = "  ".join(f"{name} {values[name]:.4g}" for name in names)
        used = f"MFU {values['mfu']:.1%}  " if "mfu" in values else ""
        text = (
            f"{losses}  {values['molecules_per_second']:.0f} molecules/s  "
            f"{values['atoms_per_second']:.0f} atoms/s  wait {values['data_wait']:.1%}  "
            f"{used}lr {values['learning_rate']:.2g}  {values['memory_gib']:.2f} GiB"
        )
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
        else:
            print(f"step {step}/{self.total}  {text}  {_clock(left)} left", flush=True)

    def note(self, text):
        """Say something between steps."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def _clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
