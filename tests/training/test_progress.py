"""What a person sees: one bar or plain lines on rank 0, nothing elsewhere, and a right table."""

import io
import math

import pytest

from tram_ds.training.progress import Progress, results_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


RECORD = {
    "loss": 2.5,
    "distance": 1e-3,
    "radius": 2e-3,
    "perturbation_length": 2e-3,
    "tokens": 500,  # of the last of two steps
    "seconds": 0.5,
    "tokens_per_second": 2000.0,
    "mfu": 0.4312,
}


def test_bar_on_a_terminal_shows_the_values():
    stream = Terminal()
    progress = Progress(rank=0, total=10, stream=stream)
    for step in range(1, 11):
        progress.update({"step": step, **RECORD})
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    for shown in (
        "10/10",
        "loss=2.5",
        "d=0.001",
        "radius=0.002",
        "|eps/T|=0.002",
        "tok/s=2,000",
        "mfu=43.1%",
    ):
        assert shown in last


def test_other_ranks_are_silent():
    stream = Terminal()
    progress = Progress(rank=1, total=10, stream=stream)
    progress.update({"step": 1, **RECORD})
    progress.message("hello")
    progress.close()
    assert stream.getvalue() == ""


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    progress = Progress(rank=0, total=100, initial=50, every_seconds=3600, stream=stream)
    for step in range(51, 61):
        progress.update({"step": step, **RECORD})
    progress.message("checkpoint saved")
    progress.close()
    progress.close()
    first, message, last = stream.getvalue().splitlines()
    assert first.startswith("step 51/100 loss=2.5 d=0.001") and "ETA" in first
    assert message == "checkpoint saved" and last.startswith("step 60/100")


def test_missing_and_non_finite_values_do_not_matter():
    stream = io.StringIO()
    progress = Progress(rank=0, total=2, stream=stream)
    progress.update({"step": 1, "loss": math.nan, "distance": None})
    progress.close()
    assert "loss=nan" in stream.getvalue() and "d=" not in stream.getvalue()


def row(text, name):
    (line,) = [line for line in text.splitlines() if name in line]
    return [cell.strip() for cell in line.strip("│┃ ").split("│")]


def test_table_marks_the_training_domain_and_averages_the_others():
    before = {"Art": 20.0, "Math": 30.0, "Law": 40.0}
    after = {"Art": 15.0, "Math": 15.0, "Law": 42.0}
    text = results_text(before, after, train_domains=["Math"])
    assert row(text, "Math (trained)") == ["Math (trained)", "30.00", "15.00", "-50.0"]
    assert row(text, "Law") == ["Law", "40.00", "42.00", "+5.0"]
    # (20 + 40) / 2 = 30 and (15 + 42) / 2 = 28.5, which is 5 % less
    assert row(text, "zero-shot") == ["zero-shot average (2)", "30.00", "28.50", "-5.0"]
    assert text.index("Math") < text.index("Art") < text.index("Law") and "lower is better" in text


def test_a_domain_called_as_a_style_keeps_its_name():
    text = results_text({}, {"[red]d": 20.0, "d": 30.0}, train_domains=["d"])
    assert row(text, "[red]d") == ["[red]d", "-", "20.00", "-"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_table_with_missing_and_non_finite_values(value):
    text = results_text(
        {"Art": 2.0}, {"Art": value, "Law": 3.0}, train_domains=[], metric="accuracy"
    )
    assert row(text, "Law") == ["Law", "-", "3.0000", "-"]
    assert row(text, "Art")[-1] == "-" and "higher is better" in text
