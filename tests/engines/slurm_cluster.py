"""A real SLURM in one folder: a controller and two nodes of one core and one made-up GPU on loopback, without munge,
root or accounting."""

import contextlib
import getpass
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NODES = ("n1", "n2")
MAX_ARRAY_SIZE = 11
ONLY_GPUS = """
function slurm_job_submit(job, partitions, user)
    if job.partition == "gpus" and not job.tres_per_node then
        slurm.log_user("only jobs with a GPU")
        return slurm.ERROR
    end
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user)
    return slurm.SUCCESS
end
"""
"""The rule of the partition `gpus`, such as many clusters have."""


class Cluster(NamedTuple):
    """Where it lies, the environment that its commands need, and its daemons by name: slurmctld, n1, n2."""

    folder: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def run(self, *command: Any, check: bool = True) -> str:
        done = subprocess.run(list(map(str, command)), env=self.env, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def states(self, job: str) -> dict[str, str]:
        """The state of a job, or of each element of an array: '7_1' -> 'RUNNING'. Ended ones stay for minutes."""
        return dict(line.split() for line in self.run("squeue", "-hrtall", f"-j{job}", "-o%i %T").splitlines())

    def told(self, job: str, name: str) -> str:
        """One value that the controller knows of a job, such as ExitCode."""
        return self.run("scontrol", "show", "job", job).partition(f" {name}=")[2].split()[0]

    def exits(self) -> Counter[int]:
        """How many tasks ended with each exit code, as the nodes say: the controller forgets a requeued one."""
        said = "".join((self.folder / f"slurmd.{node}.log").read_text() for node in NODES)
        return Counter(map(int, re.findall(r"exited with exit code (\d+)", said)))

    def wait_for(self, true: Callable[[], Any], seconds: float = 120) -> Any:
        """What `true` returns once it is true."""
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, self.run("squeue", "-rtall", check=False)
            time.sleep(0.1)
        return found

    def start(self) -> None:
        """Start the daemons that are not there."""
        conf = self.env["SLURM_CONF"]
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        for name, line in {"slurmctld": ["slurmctld", "-D"], **{n: ["slurmd", "-D", "-N", n] for n in NODES}}.items():
            if name not in self.daemons or self.daemons[name].poll() is not None:
                self.daemons[name] = subprocess.Popen([*line, "-f", conf], env=self.env, **quiet)
                if name == "slurmctld":  # a node that finds nobody to register with asks again in seconds or minutes
                    self.wait_for(self._answers, seconds=30)

    def _answers(self) -> bool:
        """Whether the controller takes connections. SLURM's own commands are patient, for half a minute."""
        port = re.search(r"SlurmctldPort=(\d+)", (self.folder / "slurm.conf").read_text())
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port[1] if port else 0))):
            return True
        return False

    def mend(self) -> None:
        """Start the daemons that are not there, and wait until every node takes jobs."""
        self.start()
        self.wait_for(
            lambda: self.run("sinfo", "-pmain", "-hNo%t", check=False).split() == ["idle"] * len(NODES), seconds=60
        )

    def wait_ended(self, job: str) -> dict[str, str]:
        """The last states of a job's elements."""
        going = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"}
        self.wait_for(lambda: not going & set(self.states(job).values()), seconds=300)
        return self.states(job)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def configuration(folder: Path) -> str:
    host, user, (control, *ports) = socket.gethostname().split(".")[0], getpass.getuser(), free_ports(1 + len(NODES))
    settings = {
        "ClusterName": "boomgen",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": control,
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "AuthInfo": "cred_expire=5",  # a requeued job waits for this, by default two minutes
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SwitchType": "switch/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdPidFile": folder / "slurmd.%n.pid",
        "SlurmdLogFile": folder / "slurmd.%n.log",
        "SlurmdSpoolDir": folder / "spool.%n",
        "SlurmdParameters": "config_overrides",
        "StateSaveLocation": folder / "state",
        "ReturnToService": 2,
        "KillWait": 10,
        "SlurmdTimeout": 15,  # nodes register each 20 thirds of it: a job whose slurmstepd died runs on until then
        "MaxArraySize": MAX_ARRAY_SIZE,
        "SlurmdDebug": "verbose",
        "GresTypes": "gpu",
        "JobSubmitPlugins": "lua",
        "MailProg": "/bin/true",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    where = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=1 RealMemory=8000 Gres=gpu:1 State=UNKNOWN"
    lines += [f"NodeName={name} Port={port} {where}" for name, port in zip(NODES, ports, strict=True)]
    where = f"Nodes={','.join(NODES)} MaxTime=INFINITE State=UP"
    lines += [f"PartitionName=main Default=YES {where}", f"PartitionName=gpus {where}"]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start it; its jobs and daemons end with the block."""
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    conf = folder.resolve() / "slurm.conf"  # slurmstepd hangs on a relative one
    conf.write_text(configuration(folder.resolve()))
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File=/dev/null\n")  # any device will do
    (folder / "job_submit.lua").write_text(ONLY_GPUS)
    cluster = Cluster(folder, os.environ | {"SLURM_CONF": str(conf)}, {})
    try:
        cluster.mend()
        yield cluster
    finally:
        cluster.run("scancel", f"--user={getpass.getuser()}", check=False)
        with contextlib.suppress(AssertionError):
            cluster.wait_for(lambda: not cluster.run("squeue", "-h", check=False).strip(), seconds=20)
        for daemon in reversed(cluster.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in cluster.daemons.values():
            daemon.wait(20)
