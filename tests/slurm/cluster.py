"""A real Slurm on this machine: munge, slurmctld and three slurmd in a folder of their own. Needs root."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={state}/munge/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmdSpoolDir={state}/%n
StateSaveLocation={state}/ctld
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1,sched_min_interval=0
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=20
MinJobAge=600
{nodes}
PartitionName=ci Nodes=node[1-3] Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=60 State=UP
PartitionName=hi Nodes=node[1-3] MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
"""
"""Jobs in ``hi`` push those in ``ci`` aside, which get USR1 and a minute to save."""
NODE = "NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=4000 State=UNKNOWN"
NODES = 3
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"Slurm is not installed here (no {', '.join(absent)})"
    return None if os.geteuid() == 0 else "a test cluster needs root"


class Cluster:
    """Three nodes, two partitions, ports of its own. Use as a context manager."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self.environment = {**os.environ, "SLURM_CONF": str(state / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop_daemons()
            raise
        return self

    def _start(self) -> None:
        state = self._state
        names = [f"node{number}" for number in range(1, NODES + 1)]
        for name in ("ctld", "log", "munge", *names):
            (state / name).mkdir(parents=True)
        state.chmod(0o711)
        (state / "munge").chmod(0o711)
        host = self._call("hostname", "-s").strip()
        ports = _free_ports(1 + NODES)
        nodes = [NODE.format(number=n, host=host, port=ports[n]) for n in range(1, NODES + 1)]
        (state / "slurm.conf").write_text(
            CONF.format(host=host, state=state, ports=ports, nodes="\n".join(nodes))
        )
        key = state / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        munge = state / "munge"
        self._call(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={munge}/munge.socket",
            f"--pid-file={munge}/pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        )
        self._call("slurmctld", "-f", str(state / "slurm.conf"))
        for node in names:
            self._call("slurmd", "-N", node, "-f", str(state / "slurm.conf"))
        self.until(
            lambda: self._call("sinfo", "-h", "-p", "ci", "-t", "idle", "-o", "%D").strip() == str(NODES),
            30,
            "idle nodes",
        )

    def __exit__(self, *details: object) -> None:
        try:
            self._call("scancel", "-f", "-s", "KILL", "-t", "RUNNING", "-u", "root")
            self._call("scancel", "-f", "-u", "root")
            self.until(lambda: not self._call("squeue", "-h").strip(), 40, "an empty queue")
        finally:
            self._stop_daemons()

    def _stop_daemons(self) -> None:
        names = [*(f"slurmd-node{number}" for number in range(1, NODES + 1)), "slurmctld"]
        daemons = [self._stop(self._state / f"{name}.pid") for name in names]
        # The daemons sign their last messages: munge goes last.
        psutil.wait_procs([daemon for daemon in daemons if daemon is not None], timeout=20)
        self._stop(self._state / "munge" / "pid")

    def python(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Run Python where SLURM's commands reach this cluster; what it wrote on standard output and standard error."""
        done = subprocess.run(
            [sys.executable, *words], env=self.environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == code, f"{words}: code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    def submit(self, *words: str) -> int:
        """sbatch; returns the job's number."""
        return int(self._call("sbatch", "--parsable", *words).strip())

    def wait(self, job: int, timeout_s: float) -> dict[str, str]:
        """The facts of a job (`scontrol show job`) once it has ended."""
        self.until(lambda: self.facts(job)["JobState"] in OVER, timeout_s, f"the end of job {job}")
        return self.facts(job)

    def facts(self, job: int | str) -> dict[str, str]:
        """`scontrol show job` of a job or of a row of an array."""
        text = self._call("scontrol", "show", "job", "-o", str(job)).splitlines()[0]
        return {key: value for key, sep, value in (word.partition("=") for word in text.split()) if sep}

    def control(self, *words: str) -> str:
        """`scontrol` with these words."""
        return self._call("scontrol", *words)

    def signal(self, job: int | str, *flags: str) -> None:
        """`scancel`."""
        self._call("scancel", *flags, str(job))

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.5) -> None:
        """Wait.

        Args:
            condition: to become true; it may start commands, so it is not asked without a pause.
            timeout_s: the longest wait.
            what: is waited for.
            every_s: between two questions.

        Raises:
            TimeoutError: it did not come true; the message tells what, and how the queue stands.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {timeout_s} s\n{self._call('squeue')}")
            time.sleep(every_s)

    def _call(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    @staticmethod
    def _stop(pid_file: Path) -> psutil.Process | None:
        if not pid_file.exists():
            return None
        try:
            process = psutil.Process(int(pid_file.read_text()))
            process.terminate()
        except psutil.NoSuchProcess:
            return None
        return process


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to outgoing connections, so that nothing takes them in between."""
    free: list[int] = []
    for port in random.sample(range(12000, 32000), 200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and len(free) < count:
                free.append(port)
    return free


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin"
