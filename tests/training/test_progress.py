"""What a person sees of a run."""

import io

import pytest

from mspt.training import progress
from mspt.training.progress import Progress

VALUES = {
    "coord": 0.51234567,
    "masked_ir": 0.25,
    "contrast": 3.5,
    "grad_norm": 1.25,
    "molecules": 64,
    "loss": 4.26234567,
    "molecules_per_second": 1234.5,
    "atoms_per_second": 22334.4,
    "data_wait": 0.0123,
    "mfu": 0.345,
    "learning_rate": 4.2e-4,
    "memory_gib": 1.234,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_one_plain_line_a_step(clock, capsys):
    shown = Progress(total=100, start=0, enabled=True)
    clock[0] = 60.0
    shown.report(10, VALUES)
    shown.note("a checkpoint")
    shown.close()
    line, note = capsys.readouterr().out.splitlines()
    assert line == (
        "step 10/100  loss 4.262  coord 0.5123  masked_ir 0.25  contrast 3.5  1234 molecules/s  22334 atoms/s  "
        "wait 1.2%  MFU 34.5%  lr 0.00042  1.23 GiB  9:00 left"
    )
    assert note == "a checkpoint"


def test_a_resumed_run_counts_its_own_steps_for_the_time_left(clock, capsys):
    shown = Progress(total=100, start=80, enabled=True)
    clock[0] = 3600.0
    shown.report(90, VALUES)
    assert capsys.readouterr().out.rstrip().endswith("1:00:00 left")
    shown.report(100, VALUES)
    assert capsys.readouterr().out.rstrip().endswith("0:00 left")


def test_a_loss_that_is_not_finite_is_shown(capsys):
    Progress(total=2, start=0, enabled=True).report(1, VALUES | {"loss": float("nan"), "coord": float("inf")})
    assert "loss nan  coord inf" in capsys.readouterr().out


def test_other_ranks_are_silent(capsys):
    silent = Progress(total=10, start=0, enabled=False)
    silent.report(1, VALUES)
    silent.note("nothing")
    silent.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "400")
    shown = Progress(total=100, start=20, enabled=True)
    assert "20/100" in terminal.getvalue()
    shown.report(30, VALUES)
    shown.note("a checkpoint")
    shown.report(40, VALUES)
    shown.close()
    text = terminal.getvalue()
    assert "40/100" in text
    assert "loss 4.262  coord 0.5123" in text
    assert "a checkpoint\n" in text
    assert shown.bar.n == 40
