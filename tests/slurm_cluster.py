"""A throw-away SLURM on this machine: one controller and two nodes on loopback, in one folder; for
tests only.

Nothing outside the folder is used but the names node1 and node2 in /etc/hosts, which are taken out
again. Every process is stopped by its id. The Debian packages slurm-wlm and munge are installed if
they are missing, and stay.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import free_port

HOSTS = Path("/etc/hosts")
NODES = 2
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its credential has expired: 120 s if this is not said
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=2-0 PriorityTier=1 GraceTime=30 State=UP
PartitionName=high Nodes=node[1-2] MaxTime=2-0 PriorityTier=10 PreemptMode=OFF State=UP
"""
NODE = """
NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} State=UNKNOWN \\
  CPUs=256 RealMemory=1000000 Gres=gpu:a100:8,gpu:h100:8
"""


# Debian keeps the daemons where only root looks.
PATH = os.environ["PATH"] + ("" if "/usr/sbin" in os.environ["PATH"].split(":") else ":/usr/sbin")


def installed() -> bool:
    return all(shutil.which(command, path=PATH) for command in COMMANDS)


def install() -> None:
    """Makes the SLURM commands available; skips the test, saying why, where that cannot be done."""
    if os.geteuid():
        pytest.skip("a SLURM of one's own needs root: its daemons start jobs")
    if installed():
        return
    if not shutil.which("apt-get"):
        pytest.skip("SLURM is not installed, and there is no apt-get to install it with")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
    for command in (packages, ["apt-get", "update"], packages):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=300)
        if installed():
            return
    pytest.skip(f"apt-get could not install slurm-wlm and munge: {done.stderr.strip()[-300:]}")


class Cluster:
    """Start it, submit to it with `env`, kill nodes of it, stop it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hosts: str | None = None
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        """Both nodes idle, or the test fails with the logs."""
        for name in ("state", "spool/node1", "spool/node2", "dev"):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        self._configure()
        self.hosts = HOSTS.read_text()
        HOSTS.write_text(self.hosts.rstrip("\n") + "\n" + self._names())
        self._munge()
        self.run("slurmctld", "-f", self.env["SLURM_CONF"])
        for i in range(1, NODES + 1):
            self.start_node(i)
        self.wait(lambda: self.states() == ["idle"] * NODES, 30, "two idle nodes")

    def start_node(self, i: int) -> None:
        """Boots a node."""
        self.run("slurmd", "-f", self.env["SLURM_CONF"], "-N", f"node{i}")

    def kill_node(self, i: int) -> None:
        """What a power cut does: slurmd, its step daemons and all processes of its jobs die at
        once."""
        dead = [self._pid(f"slurmd.node{i}.pid")]
        for pid, parent, environ in _processes():
            if (
                f"SLURMD_NODENAME=node{i}" in environ
                and f"SLURM_CONF={self.env['SLURM_CONF']}" in environ
            ):
                dead += [pid, *([parent] if _comm(parent).startswith("slurmstepd") else [])]
        for pid in dict.fromkeys(dead):
            _kill(pid, signal.SIGKILL)

    def states(self) -> list[str]:
        """State of every node, e.g. idle, mixed, down."""
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

    def job(self, job_id: str) -> dict[str, str]:
        """SLURM's record of a job."""
        text = self.run("scontrol", "show", "job", "-o", job_id).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def run(self, *command: str) -> str:
        """Output of a command; its failure is the test's."""
        done = subprocess.run(
            command, env=self.env, cwd=self.root, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (
            f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def wait(self, ready: Callable[[], object], timeout: float, what: str) -> None:
        """Until `ready()`; fails with the logs after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not ready():
            assert time.monotonic() < end, f"no {what} within {timeout:g} s\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """Ends of the daemons' logs."""
        return "\n".join(
            f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}"
            for log in sorted(self.root.glob("*.log"))
        )

    def stop(self) -> None:
        """Stops the jobs and then the daemons, by process id, and takes the names out of
        /etc/hosts."""
        with contextlib.suppress(Exception):
            subprocess.run(
                ["scancel", "--user=root"], env=self.env, capture_output=True, timeout=20
            )
            self.wait(lambda: not self.run("squeue", "-h"), 5, "empty queue")
        ours = f"SLURM_CONF={self.env['SLURM_CONF']}"
        daemons = [self._pid(file.name) for file in self.root.glob("*.pid")]
        for pid in daemons:
            _kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while (
            any(Path(f"/proc/{pid}").exists() for pid in daemons if pid) and time.monotonic() < end
        ):
            time.sleep(0.05)
        left = [pid for pid, _, environ in _processes() if ours in environ and pid != os.getpid()]
        for pid in [*daemons, *left]:
            _kill(pid, signal.SIGKILL)
        if self.hosts is not None and HOSTS.read_text().endswith(self._names()):
            HOSTS.write_text(self.hosts)

    def _names(self) -> str:
        return "127.0.0.1 " + " ".join(f"node{i}" for i in range(1, NODES + 1)) + "\n"

    def _configure(self) -> None:
        host, ports = (
            socket.gethostname().partition(".")[0],
            [free_port() for _ in range(1 + NODES)],
        )
        nodes = [NODE.format(i=i, host=host, port=ports[i]) for i in range(1, NODES + 1)]
        conf = CONF.format(root=self.root, host=host, ports=ports, nodes="\n".join(nodes))
        (self.root / "slurm.conf").write_text(conf)
        # loaded by slurmd, used by nothing here
        kind = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/{kind}\n")
        # SLURM counts these devices and numbers them in CUDA_VISIBLE_DEVICES; nothing opens them
        for gpu in range(16):
            os.mknod(self.root / f"dev/nvidia{gpu}", 0o600 | 0o020000, os.makedev(195, gpu))
        kinds = {"a100": "0-7", "h100": "8-15"}
        lines = [
            f"Name=gpu Type={kind} File={self.root}/dev/nvidia[{ids}]\n"
            for kind, ids in kinds.items()
        ]
        (self.root / "gres.conf").write_text("".join(lines))

    def _munge(self) -> None:
        """An authentication daemon with a key of its own."""
        root = self.root
        (root / "munge.key").write_bytes(os.urandom(1024))
        (root / "munge.key").chmod(0o400)
        places = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [
            f"--{option}={root}/munge{'d' if end == 'pid' else ''}.{end}"
            for option, end in places.items()
        ]
        self.run("munged", "--force", *options)

    def _pid(self, name: str) -> int:
        file = self.root / name
        return int(file.read_text().strip() or 0) if file.exists() else 0


def _processes() -> list[tuple[int, int, list[str]]]:
    """(process id, that of its parent, environment) of every process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found.append((int(folder.name), parent, environ))
    return found


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _kill(pid: int, number: signal.Signals) -> None:
    if pid > 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
