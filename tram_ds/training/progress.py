"""What a person sees while a run goes: one progress bar or plain lines on rank 0, and the table at
the end."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

LOWER_IS_BETTER = ("perplexity", "loss", "error")


class Progress:
    """Shows the training on rank 0; silent on other ranks. On a terminal one bar, elsewhere a line
    every few seconds.

    rank: only 0 shows anything. total: last step of the run. initial: the step a resumed run starts
    from.
    every_seconds: between plain lines. stream: default stderr.
    """

    def __init__(
        self,
        rank: int,
        total: int,
        initial: int = 0,
        every_seconds: float = 30.0,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._total = total
        self._first = self._step = initial
        self._every_seconds = every_seconds
        self._started = self._printed = time.monotonic()
        self._latest: dict[str, str] = {}
        self._rate = _Rate()
        self._plain = rank == 0 and not self._stream.isatty()
        self._bar: tqdm[Any] | None = None
        if rank == 0 and not self._plain:
            self._bar = tqdm(
                total=total,
                initial=initial,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows the record of a step, as written to metrics.jsonl: step, loss, distance, radius,
        perturbation_norm.

        Tokens per second are smoothed. Keys may be missing or None.
        """
        if self._bar is None and not self._plain:
            return
        step = int(record["step"])
        self._rate.add(record)
        self._latest = describe(record, self._rate.per_second())
        if self._bar is not None:
            # the update after it draws, once
            self._bar.set_postfix(self._latest, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._plain and (
            time.monotonic() - self._printed >= self._every_seconds or step == self._first + 1
        ):
            self._print_line()

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar; rank 0 only."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._plain:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar, or the last line, on the screen. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._plain and self._step > self._first + 1:
            self._print_line()
        self._bar, self._plain = None, False

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        seconds = (
            (self._printed - self._started)
            / max(1, self._step - self._first)
            * (self._total - self._step)
        )
        values = " ".join(f"{name}={value}" for name, value in self._latest.items())
        eta = tqdm.format_interval(max(0.0, seconds))
        print(f"step {self._step}/{self._total} {values} ETA {eta}", file=self._stream, flush=True)


class _Rate:
    """Tokens per second over about the last 20 records."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        rate, seconds = record.get("tokens_per_second"), record.get("seconds")
        if isinstance(rate, int | float) and isinstance(seconds, int | float):
            self._tokens = 0.95 * self._tokens + rate * seconds
            self._seconds = 0.95 * self._seconds + seconds

    def per_second(self) -> float | None:
        return self._tokens / self._seconds if self._seconds > 0 else None


def describe(record: Mapping[str, Any], tokens_per_second: float | None) -> dict[str, str]:
    """The values of a step as short text, in the order they are shown; |eps/T| is the realised
    perturbation's size."""
    shown = {
        "loss": record.get("loss"),
        "d": record.get("distance"),
        "radius": record.get("radius"),
        "|eps/T|": record.get("perturbation_length"),
    }
    texts = {name: _short(value) for name, value in shown.items() if value is not None}
    if tokens_per_second is not None:
        texts["tok/s"] = f"{tokens_per_second:,.0f}"
    if (mfu := record.get("mfu")) is not None:
        texts["mfu"] = f"{mfu:.1%}"
    return texts


def results_table(
    before: Mapping[str, float],
    after: Mapping[str, float],
    train_domains: Sequence[str],
    metric: str = "perplexity",
) -> Table:
    """Per domain the metric before and after training and the change in per cent; the training
    domains are marked.

    The last row averages over the domains that were not trained on and have both values
    (zero-shot). A value that is missing shows as "-". The training domains come first, the others
    in the order of `after`.
    """
    lower = any(word in metric for word in LOWER_IS_BETTER)
    table = Table(title=f"{metric} per domain ({'lower' if lower else 'higher'} is better)")
    table.add_column("domain")
    for name in ("before", "after", "change %"):
        table.add_column(name, justify="right")
    domains = sorted(
        dict.fromkeys((*after, *before)), key=lambda domain: domain not in train_domains
    )
    for domain in domains:
        name = f"{domain} (trained)" if domain in train_domains else domain
        table.add_row(escape(name), *_cells(before.get(domain), after.get(domain), lower))
    others = [
        domain
        for domain in domains
        if domain not in train_domains and domain in before and domain in after
    ]
    if others:
        means = [
            math.fsum(values[domain] for domain in others) / len(others)
            for values in (before, after)
        ]
        table.add_section()
        table.add_row(f"zero-shot average ({len(others)})", *_cells(means[0], means[1], lower))
    return table


def results_text(
    before: Mapping[str, float],
    after: Mapping[str, float],
    train_domains: Sequence[str],
    metric: str = "perplexity",
) -> str:
    """`results_table` as plain text, for logs and files."""
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(results_table(before, after, train_domains, metric))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _cells(before: float | None, after: float | None, lower: bool) -> tuple[str, str, str]:
    texts = ("-" if before is None else _value(before), "-" if after is None else _value(after))
    if (
        before is None
        or after is None
        or before == 0
        or not math.isfinite(before)
        or not math.isfinite(after)
    ):
        return (*texts, "-")
    change = 100 * (after - before) / abs(before)
    colour = "green" if (change < 0) == lower else "red"
    return (*texts, f"[{colour}]{change:+.1f}[/]" if change else "0.0")


def _value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _short(value: Any) -> str:
    return f"{float(value):.4g}"
