"""The terminal is not the run: a program goes on, and ends as it would have, with its standard
streams closed, full, left by their reader, or of a poor encoding."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT, environment
from tram_ds.runtime import terminal

START = "from tram_ds.runtime import terminal\nterminal.guard()\n"
WORK = """
import logging, os, sys, tempfile, threading, warnings
from rich.console import Console
from tqdm import tqdm
with tempfile.TemporaryFile() as file:
    assert file.fileno() > 2, "a file of ours became a standard stream"
logging.basicConfig(stream=sys.stdout, level="INFO", force=True)
logging.getLogger().addHandler(logging.StreamHandler())
def work():
    for n in tqdm(range(300), mininterval=0):
        print("line", n, "x" * 100, flush=n % 7 == 0)
        logging.info("logged %d", n)
        Console().print("a [bold]table[/]")
        Console(stderr=True).print("another")
        warnings.warn(f"warning {n}")
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
os.write(1, b"compiled code"), os.write(2, b"compiled code")
open("finished", "w").write("yes")
"""
REDIRECTED = (
    *(">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "< /dev/null >&- 2> err"),
    *("> /dev/full", "2> /dev/full", "> /dev/full 2>&1"),
    *("2> err | true", "2> err | head -1", "2>&1 | true", "2>&1 | head -1", "2> >(true) > out"),
)


def shell(
    folder: Path, code: str, redirected: str = "", *flags: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -c code` with its streams as bash redirects them; the exit code is python's."""
    (folder / "program.py").write_text(START + code)
    line = f'"$PY" {" ".join(flags)} program.py {redirected}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment(PY=sys.executable, **variables),
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("redirected", REDIRECTED)
def test_work_goes_on_without_a_terminal(
    tmp_path: Path, redirected: str, flags: tuple[str, ...]
) -> None:
    work = WORK
    if "true" in redirected or "head" in redirected:
        work = work.replace('os.write(1, b"compiled code"), os.write(2, b"compiled code")', "")
    if "full" in redirected:
        work = work.replace("os.write(", "(lambda *_: 0)(")  # ours cannot help what others write
    done = shell(tmp_path, work, redirected, *flags)
    assert done.returncode == 0
    assert (tmp_path / "finished").read_text() == "yes"
    said = done.stdout + done.stderr
    if (tmp_path / "err").exists():
        said += (tmp_path / "err").read_text()
    assert "Traceback" not in said and "Exception ignored" not in said and "Error" not in said


def test_what_can_be_shown_is_shown_whole_and_in_order(tmp_path: Path) -> None:
    code = "for n in range(5000): print('line', n)\nprint('no end', end='')"
    expected = "".join(f"line {n}\n" for n in range(5000)) + "no end"
    assert shell(tmp_path, code).stdout == expected
    assert shell(tmp_path, code, "2>&-").stdout == expected
    assert shell(tmp_path, code, "", "-u").stdout == expected


def test_after_a_reader_has_left_children_and_compiled_code_write_nowhere(tmp_path: Path) -> None:
    code = """
import os, subprocess, sys, time
time.sleep(0.3)
print("to nobody", flush=True)
assert os.path.samefile(f"/proc/self/fd/1", os.devnull)
os.write(1, b"compiled code")
assert subprocess.run([sys.executable, "-c", "print('child')"]).returncode == 0
"""
    done = shell(tmp_path, code, "| true")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_disk_that_has_room_again_is_written_to_again(tmp_path: Path) -> None:
    code = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
print("before"); print("beyond eight bytes", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print("after")
"""
    assert shell(tmp_path, code, "> log").returncode == 0
    log = (tmp_path / "log").read_text()
    assert log.startswith("before\n") and log.endswith("after\n") and "eight" not in log


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_written_as_an_escape(tmp_path: Path, encoding: str) -> None:
    code = "print('d\\u2032 = \\u00e4'); print('file \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
    )
    shown = {"ascii": b"d\\u2032 = \\xe4", "latin-1": b"d\\u2032 = \xe4"}
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == shown.get(encoding, "d\u2032 = \u00e4".encode())
    assert second == b"file \\udcff"


def test_a_full_non_blocking_pipe_is_waited_for(tmp_path: Path) -> None:
    """Some parents (node, ssh) hand down pipes that do not block."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = START + "print('x' * 300_000)"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=writing)
    os.close(writing)
    time.sleep(1.0)
    with open(reading, "rb") as file:
        assert len(file.read()) == 300_001
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("> /dev/full", 2, "error: not all of this report could be written: [Errno 28]"),
        ("| true", 0, ""),
        (">&-", 0, ""),
        ("> whole", 0, ""),
    ],
)
def test_a_report_that_is_cut_says_so(
    tmp_path: Path, redirected: str, code: int, said: str
) -> None:
    program = "import sys, time\ntime.sleep(0.3)\nprint('table')\nsys.exit(terminal.reported())"
    done = shell(tmp_path, program, redirected)
    assert done.returncode == code
    assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == bool(said)


def test_streams_of_a_test_or_a_notebook_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    terminal.guard()
    assert (sys.stdout, sys.stderr) == before
    assert terminal.reported() == 0 and terminal.reported(1) == 1


def test_what_a_launcher_says_goes_through_ours(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(75)"
    assert terminal.Relay([sys.executable, "-c", code]).wait() == 75
    assert capsys.readouterr() == ("out\n", "err\n")
    with pytest.raises(FileNotFoundError):
        terminal.Relay(["/no/such/launcher"])


def test_a_launcher_is_not_ended_by_the_reader_that_left(tmp_path: Path) -> None:
    """It would fail in its last flush, with exit code 120, after the run is done."""
    child = "import time; [print('line', n) for n in range(50_000)]; time.sleep(0.2); print('end')"
    code = f"import sys\nsys.exit(terminal.Relay([sys.executable, '-c', {child!r}]).wait())"
    for redirected in ("| true", "| head -1", "> /dev/full", ">&-", "2>&1 | true"):
        done = shell(tmp_path, code, redirected)
        assert (done.returncode, done.stderr) == (0, ""), redirected


def test_what_a_launcher_leaves_behind_does_not_hold_the_end_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.2)
    code = "import subprocess, sys; subprocess.Popen(['sleep', '5'])"
    began = time.monotonic()
    assert terminal.Relay([sys.executable, "-c", code]).wait() == 0
    assert time.monotonic() - began < 4.0


def test_every_command_guards_first() -> None:
    scripts = sorted((ROOT / "launch").glob("*.py"))
    assert len(scripts) >= 11
    assert not [p.name for p in scripts if "cli.main import script" not in p.read_text()]
    lines = (ROOT / "tram_ds" / "cli" / "main.py").read_text().splitlines()
    begins = next(n for n, line in enumerate(lines) if line.startswith("def main("))
    body = [line.strip() for line in lines[begins : begins + 6]]
    assert body[body.index("terminal.guard()") - 1].endswith('"""'), "before anything else"


@pytest.mark.parametrize(
    ("start", "name", "heard"),
    [
        ("", "SIGHUP", "SIGHUP"),
        ("trap '' HUP; ", "SIGHUP", "None"),  # nohup
        ("trap '' USR1 USR2 TERM; ", "SIGTERM", "SIGTERM"),  # our job script, while Python imports
        ("trap '' USR1 USR2 TERM; ", "SIGUSR1", "SIGUSR1"),
        ("trap '' USR1 USR2 TERM; ", "SIGUSR2", "SIGUSR2"),
    ],
)
def test_a_signal_is_a_request_to_stop(start: str, name: str, heard: str) -> None:
    """Also a terminal that hangs up, unless our parent had that ignored."""
    code = f"""
import os, signal
from tram_ds.runtime.signals import StopRequest
with StopRequest().listening() as stop:
    os.kill(os.getpid(), signal.{name})
print(getattr(stop.received, "name", None))
os.kill(os.getpid(), signal.{name})
"""
    line = f'{start}exec "{sys.executable}" -c "$CODE"'
    done = subprocess.run(
        ["bash", "-c", line], env=environment(CODE=code), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{heard}\n"), done.stderr
