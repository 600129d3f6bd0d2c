"""The cohort of the chaos benchmark, and commands forked from this process, which has imported all that they need."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before any of them is imported: a forked process has no threads of its parent

VERBS = ("tile", "extract", "train", "score")
SLIDES = 6
LEASE_S = 0.6
ENDS_S = 120.0


class Broken(AssertionError):
    """A promise that did not hold; the message says which."""


@dataclass
class Command:
    """A command line under way, in a process group of its own."""

    pid: int
    args: list[str]
    log: Path
    began: float = field(default_factory=time.monotonic)
    status: int | None = None

    def over(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def send(self, number: int) -> None:
        if not self.over():
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # it has only just begun, and no group of its own yet
                os.kill(self.pid, number)

    def wait(self, seconds: float = ENDS_S) -> int:
        """Its exit code, or minus the signal that killed it."""
        until = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGCONT)
                os.killpg(self.pid, signal.SIGKILL)
                raise Broken(f"{' '.join(self.args)} did not end within {seconds:.0f} s: {self.said()[-2000:]}")
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class World:
    """The cohort, and what undisturbed commands make of it. place: a folder of its own."""

    def __init__(self, place: Path) -> None:
        from tests.extract.slides import tissue_rgb, write_svs

        self.place = place
        self.slides, self.labels = place / "slides", place / "labels.csv"
        self.slides.mkdir(parents=True)
        lines = ["slide,patient,label"]
        for k in range(SLIDES):
            write_svs(self.slides / f"s{k}.svs", tissue_rgb(512, 512, k))
            lines.append(f"s{k}.svs,p{k},{('a', 'b')[k % 2]}")
        self.labels.write_text("\n".join(lines) + "\n")
        self._n = 0
        self.calm: dict[str, Path] = {}  # the work folder after each verb
        self.seconds: dict[str, float] = {}
        work = place / "calm"
        for verb in VERBS:
            self._import(self.start(place / "first", verb))  # what it imports, every later fork has
            began = time.monotonic()
            command = self.start(work, verb)
            code = command.wait()
            if code != 0:
                raise Broken(f"the undisturbed {verb} ended with {code}: {command.said()}")
            self.seconds[verb] = time.monotonic() - began
            self.calm[verb] = shutil.copytree(work, place / f"calm-{verb}", symlinks=True)
        self.verify = "verify" in self.run(work, "--help").said()

    def _import(self, command: Command) -> None:
        """Import here what the command imported."""
        if command.wait() != 0:
            raise Broken(f"the undisturbed {command.args[0]} ended with {command.wait()}: {command.said()}")
        for name in command.log.with_suffix(".modules").read_text().split():
            with suppress(Exception):  # some modules exist only once another one is at work
                importlib.import_module(name)

    def arguments(self, work: Path, verb: str, other: bool = False, workers: int = 1) -> list[str]:
        """The verb's command line; other: with a setting that changes its outputs."""
        at = ["--work", str(work), "--workers", str(workers), "--set", f"cluster.lease_s={LEASE_S}"]
        match verb:
            case "tile":
                return ["tile", str(self.slides), "--tile-px", "128" if other else "96", *at]
            case "extract":
                return [
                    "extract",
                    "--set",
                    "extract.chunk_rows=64",
                    "--set",
                    "extract.readers=1",
                    "--set",
                    f"extract.dtype=float{32 if other else 16}",
                    *at,
                ]
            case "train":
                return [
                    "train",
                    "--labels",
                    str(self.labels),
                    "--model",
                    "abmil",
                    "--folds",
                    "2",
                    "--epochs",
                    "3",
                    "--set",
                    f"train.lr={0.02 if other else 0.01}",
                    "--set",
                    "train.checkpoint_s=0.001",
                    "--set",
                    "train.model_params={width: 16, attention_width: 8}",
                    "--set",
                    "train.val_fraction=0.3",
                    *at,
                ]
            case "score":
                return [
                    "score",
                    "--name",
                    "abmil",
                    "--set",
                    f"score.bootstrap={30 if other else 20}",
                    "--set",
                    "score.heatmap_limit=2",
                    *at,
                ]
        raise ValueError(verb)

    def run(self, work: Path, *args: str) -> Command:
        command = self._fork(list(args), work)
        command.wait()
        return command

    def start(self, work: Path, verb: str, other: bool = False, workers: int = 1) -> Command:
        return self._fork(self.arguments(work, verb, other, workers), work)

    def _fork(self, args: list[str], work: Path) -> Command:
        self._n += 1
        log = self.place / "logs" / f"{self._n:05}.txt"
        log.parent.mkdir(exist_ok=True)
        log.touch()
        pid = os.fork()
        if pid:
            return Command(pid, args, log)
        code = 70
        try:
            os.setsid()
            out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            from mhim.pipeline.cli import main as cli

            try:
                code = cli._main(args)
            except SystemExit as ended:
                code = int(ended.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
            if len(self.calm) < len(VERBS):
                log.with_suffix(".modules").write_text("\n".join(sys.modules))
        finally:
            os._exit(code)
