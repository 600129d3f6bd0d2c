"""A real SLURM of one node on loopback, for tests: munge, slurmctld and slurmd in a folder of their own.

Needs root and the Debian packages slurmctld, slurmd, slurm-client, munge. Several may run side by side: ports, keys
and sockets are private to the folder. No accounting, no GPUs, processes tracked by process group.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


class Unavailable(Exception):
    """SLURM cannot run here; the message says why."""


def find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Cluster:
    """`with Cluster(folder) as env:` gives the environment in which sbatch, squeue and scancel speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> dict[str, str]:
        missing = [p for p in PROGRAMS if find(p) is None]
        if missing:
            raise Unavailable(f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)")
        if os.geteuid() != 0:
            raise Unavailable("slurmd needs root")
        for name in ("state", "spool", "log", "munge"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        try:
            self._munge()
            self._slurm()
        except Exception:
            self.__exit__()
            raise
        return self.env

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / "log" / f"{Path(command[0]).name}.out", "wb")  # noqa: SIM115  the daemon keeps it
        daemon = subprocess.Popen(command, stdout=log, stderr=log, env=self.env, start_new_session=True)
        self._daemons.append(daemon)
        return daemon

    def _munge(self) -> None:
        place = self.folder / "munge"
        key = place / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munged = find("munged")
        assert munged is not None
        # --force: the folders above a temporary one belong to others, which munge dislikes
        self._start(
            munged, "--foreground", "--force", f"--key-file={key}", f"--socket={place / 'socket'}",
            f"--pid-file={place / 'pid'}", f"--log-file={place / 'log'}", f"--seed-file={place / 'seed'}",
        )  # fmt: skip
        self._wait(lambda: (place / "socket").exists(), "munged")

    def _slurm(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        # a requeued job waits until its old credential has expired (120 s by default): cred_expire makes that short;
        # config_overrides lets a small machine offer more cores than it has
        cores = len(os.sched_getaffinity(0))
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder / "munge" / "socket"},cred_expire=5
SlurmdParameters=config_overrides
CredType=cred/munge
StateSaveLocation={folder / "state"}
SlurmdSpoolDir={folder / "spool"}
SlurmctldPidFile={folder / "slurmctld.pid"}
SlurmdPidFile={folder / "slurmd.pid"}
SlurmctldLogFile={folder / "log" / "slurmctld.log"}
SlurmdLogFile={folder / "log" / "slurmd.log"}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=2
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={max(4, cores)} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
        )
        for program in ("slurmctld", "slurmd"):
            path = find(program)
            assert path is not None
            self._start(path, "-D")
        self._wait(lambda: "idle" in self._said("sinfo", "-h", "-o", "%t"), "slurmctld and slurmd")

    def _said(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False).stdout

    def _wait(self, ready: object, what: str) -> None:
        until = time.monotonic() + 30
        while not ready():  # type: ignore[operator]
            if time.monotonic() > until or any(d.poll() is not None for d in self._daemons):
                said = "\n".join(
                    line
                    for log in sorted((self.folder / "log").iterdir())
                    for line in log.read_text().splitlines()[-5:]
                )
                raise Unavailable(f"{what} did not come up:\n{said}")
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
