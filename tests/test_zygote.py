"""The fork server that all rank workers and most scripts of the tests run in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ranks, zygote

PEERS = """
import os, subprocess, sys, time
rank = os.environ.get("RANK")
print("rank", rank, "of", os.environ.get("WORLD_SIZE"), "in", os.getcwd(), sys.argv[1:])
if "left" in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("child", "w").write(str(child.pid))
if "fail" in sys.argv and rank == "1":
    raise KeyError("a bug on one rank")
if "hang" in sys.argv:
    time.sleep(600)
sys.exit(7 if "seven" in sys.argv else None)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "peers.py").write_text(PEERS)
    return tmp_path / "peers.py"


def ended(pid: int) -> bool:
    """Within seconds: a kill has been sent, but not waited for."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if status.read_text().rpartition(") ")[2][0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_each_rank_has_its_place_folder_arguments_and_output(program: Path) -> None:
    done = ranks.script(program, "one", zygote.RANK_HERE, cwd=program.parent, world=2)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        f"rank {k} of 2 in {program.parent} ['one', '{k}']" for k in range(2)
    ]
    assert ranks.script(program, "seven", cwd=program.parent).returncode == 7


def test_a_rank_that_fails_ends_its_peers_and_says_why(program: Path) -> None:
    job = zygote.Job(str(program), ["fail", "hang"], ranks.places(2), str(program.parent))
    began = time.monotonic()
    end = zygote.run(job)
    assert end.codes == [-9, 1] and time.monotonic() - began < job.timeout / 2
    assert "KeyError: 'a bug on one rank'" in end.stderr and "rank 0 of 2" in end.stdout


def test_a_job_that_hangs_is_ended_with_what_it_started(program: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as hung:
        ranks.script(program, "hang", "left", cwd=program.parent, timeout=5)
    assert "rank None" in str(hung.value.output)
    assert ended(int((program.parent / "child").read_text()))


def test_what_a_job_leaves_running_ends_with_it(program: Path) -> None:
    assert ranks.script(program, "left", cwd=program.parent).returncode == 0
    assert ended(int((program.parent / "child").read_text()))


def test_ranks_that_are_started_run_beside_the_test(program: Path) -> None:
    """Others are served meanwhile; what they leave running ends with them, and their logs grow."""
    logs, folder = [program.parent / "0.log", program.parent / "1.log"], program.parent
    hanging = ranks.started(program, "hang", "left", cwd=folder, ranks=ranks.places(2), logs=logs)
    assert ranks.script(program, "seven", cwd=folder).returncode == 7
    for _ in range(1000):
        if (folder / "child").exists() and (folder / "child").read_text():
            break
        time.sleep(0.05)
    assert [rank.poll() for rank in hanging] == [None, None]
    hanging[0].kill()
    hanging[1].terminate()
    assert [rank.wait() for rank in hanging] == [-9, -15]
    hanging[0].kill()  # of one that has ended: nothing
    assert logs[1].read_text().startswith("rank 1 of 2") and hanging[0].poll() == -9
    assert ended(int((folder / "child").read_text()))


@pytest.mark.parametrize(
    ("streams", "redirected"),
    [
        ((zygote.CLOSED, zygote.CLOSED), "<&- >&-"),
        ((os.devnull, zygote.LEFT), "| true"),
        ((os.devnull, "/dev/full"), "< /dev/null > /dev/full"),
    ],
    ids=("closed", "left", "full"),
)
def test_streams_are_those_of_an_interpreter(
    tmp_path: Path, streams: tuple[str, str], redirected: str
) -> None:
    """Closed ones are None, and text that goes nowhere is an error: here of the last flush, or of
    the print where PYTHONUNBUFFERED is set."""
    program = tmp_path / "streams.py"
    program.write_text(
        "import sys, time\n"
        "time.sleep(0.2)  # the reader has gone\n"
        "print([s is None for s in (sys.stdin, sys.stdout)], file=sys.stderr)\n"
        "print('text')\n"
        "sys.exit(3)\n"
    )
    line = f"{sys.executable} {program} 2> by_bash {redirected}; exit ${{PIPESTATUS[0]}}"
    wanted = subprocess.run(["bash", "-c", line], cwd=tmp_path).returncode
    job = zygote.Job(
        str(program), [], ranks.places(1), str(tmp_path), (*streams, str(tmp_path / "forked"))
    )
    assert zygote.ended(job).codes == [wanted]
    said = [(tmp_path / name).read_text().splitlines()[0] for name in ("forked", "by_bash")]
    assert said[0] == said[1] and (wanted == 3) == (zygote.CLOSED in streams)


def test_another_environment_is_another_interpreter(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries read such variables when they are imported, which the server has done already."""
    program.write_text("import sys; print(sys.orig_argv[1:])\n")
    assert "tests.fork_server" in ranks.script(program, cwd=program.parent).stdout
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert str(program) in ranks.script(program, cwd=program.parent).stdout


def test_ports_are_free_differ_and_are_no_clients() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = [ranks.free_port() for _ in range(50)]
    assert len(set(found)) == 50 and max(found) < first and sys.platform == "linux"


def test_a_prepared_store_has_what_a_new_one_has(tmp_path: Path) -> None:
    import sqlite3

    ranks.store(tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        [(experiments,)] = database.execute("select count(*) from experiments where name='Default'")
        assert experiments == 1 and not list(database.execute("select * from runs"))
    assert os.listdir(tmp_path) == ["mlflow.db"]


def test_collecting_all_tests_leaves_a_fork_enough() -> None:
    """What test modules import may set no variable that libraries read when they are imported: all
    ranks of all tests would then be new interpreters. Asked of a process that has collected them,
    such as this one under xdist."""
    assert zygote.same_start(ranks.environment())
