"""Verbs as SLURM arrays: readable job scripts, `sbatch`, and what `squeue` says of the tasks.

In: the verbs to submit in order. Out: job numbers, at once; the work is done by the same command line on the nodes, one
share of the items per task, which anybody can run again by hand. Nothing about a job decides what is finished: outputs
do, so a job that is killed, requeued or submitted twice costs time and no result.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mhim.configs import lookup, trust
from mhim.configs.schema import Config, Settings
from mhim.pipeline.backends import ArrayState, JobFolder, SchedulerParams, Step, Submitted
from mhim.pipeline.resume.stage import Stopped
from mhim.pipeline.store import layout, writing

NAME = "slurm"


class Resources(Settings):
    """What one task asks for."""

    partition: str = Field("", description="partition; empty: the cluster's default")
    account: str = Field("", description="account to charge")
    qos: str = Field("", description="quality of service")
    time: str = Field("", description="walltime as SLURM writes it (4:00:00); empty: the partition's")
    memory: str = Field("", description="memory of a task (16G); empty: the partition's")
    cpus: int = Field(4, ge=1, description="cores of a task, and its parallel processes")
    gpus: int = Field(0, ge=0, description="GPUs of a task")
    constraint: str = Field("", description="node features (--constraint)")
    tasks: int = Field(100, ge=1, description="most tasks of the array")
    items_per_task: int = Field(1, ge=1, description="fewest items worth a task")
    at_once: int = Field(0, ge=0, description="most tasks that run at the same time; 0 leaves it to SLURM")
    extra: tuple[str, ...] = Field((), description="further sbatch options, one each: --exclude=node7")


class Params(Resources, SchedulerParams):
    """What `cluster.backend_params` may hold. tile, extract, train, score: other resources of that verb."""

    tile: dict[str, Any] = Field({}, description="resources that differ for tile")
    extract: dict[str, Any] = Field({}, description="resources that differ for extract: {partition: gpu, gpus: 1}")
    train: dict[str, Any] = Field({}, description="resources that differ for train")
    score: dict[str, Any] = Field({}, description="resources that differ for score")
    modules: tuple[str, ...] = Field((), description="environment modules to load")
    setup: tuple[str, ...] = Field((), description="shell lines before the command, such as activating an environment")
    container: str = Field("", description="Apptainer image that holds the program; empty: this installation")
    bind: tuple[str, ...] = Field((), description="further folders the container needs (path or path:inside)")
    warn_s: int = Field(120, ge=10, description="so long before the walltime a task stops, gives back and requeues, s")
    requeues: int = Field(20, ge=0, description="how often a task goes on after walltime or preemption")
    restarts: int = Field(2, ge=0, description="how often a task is started again after its process was killed")

    def of(self, verb: str) -> Resources:
        """The resources of one verb. Raises LookupFailed when one of its own is unknown."""
        common = {name: getattr(self, name) for name in Resources.model_fields}
        try:
            return Resources(**{**common, **getattr(self, verb)})
        except ValidationError as error:
            known = ", ".join(Resources.model_fields)
            raise lookup.LookupFailed(f"slurm, {verb}: {lookup.explain(error)}; it takes: {known}") from error


def submit(work: layout.Work, config: Config, steps: list[Step], replace: bool = False) -> tuple[Path, list[Submitted]]:
    """Submit `steps`, each after the one before. Returns the job folder and the arrays.

    Raises Stopped (SLURM is absent or refuses) or LookupFailed (an unknown setting)."""
    params: Params = lookup.params(sys.modules[__name__], config.cluster.backend_params)
    resources = {step.verb: params.of(step.verb) for step in steps}
    if shutil.which("sbatch") is None:
        raise Stopped("there is no `sbatch` on this machine; submit from a login node, or leave out --backend slurm")
    folder = JobFolder.new(work)
    arrays: list[Submitted] = []
    for step in steps:
        of = resources[step.verb]
        tasks = max(1, min(of.tasks, -(-step.most // of.items_per_task)))
        folder.freeze(step, config, workers=of.cpus)  # the tasks run on one machine each: every core one process
        script = folder.path / f"{step.verb}.sh"
        writing.write_atomic(script, job_script(step, folder, params, of, tasks, replace))
        script.chmod(0o755)
        after = [f"--dependency=afterany:{arrays[-1].job}"] if arrays else []
        try:
            job = _said(["sbatch", "--parsable", *after, str(script)]).split(";")[0].strip()
        except Stopped as error:
            if arrays:
                _said(["scancel", *(array.job for array in arrays)])
            folder.drop()
            raise Stopped(f"{step.verb}: {error}; nothing was submitted") from error
        arrays.append(Submitted(step.verb, job, tasks, step.most, str(script)))
        folder.remember(NAME, arrays)
    return folder.path, arrays


def job_script(step: Step, job: JobFolder, params: Params, of: Resources, tasks: int, replace: bool = False) -> str:
    """The text of one verb's job script."""
    folder, work = job.path, job.work
    asked = {
        "job-name": f"{step.verb}-{work.name}",
        "array": f"1-{tasks}" + (f"%{of.at_once}" if of.at_once else ""),
        "output": f"{folder}/logs/{step.verb}".replace("%", "%%") + "-%a.log",
        "open-mode": "append",
        "signal": f"B:USR1@{params.warn_s}",
        "partition": of.partition,
        "account": of.account,
        "qos": of.qos,
        "time": of.time,
        "mem": of.memory,
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": str(of.cpus),
        "gres": f"gpu:{of.gpus}" if of.gpus else "",
        "constraint": of.constraint,
    }
    options = [f"#SBATCH --{name}={_quoted(value)}" for name, value in asked.items() if value]
    options += ["#SBATCH --requeue", *(f"#SBATCH {_one_line(option)}" for option in of.extra)]
    command = f"{_program(params, of, work, step)} {shlex.join(job.arguments(step, replace))}"
    before = [f"module load {shlex.join(params.modules)}"] if params.modules else []
    share = f'--shard "${{SLURM_ARRAY_TASK_ID:-1}}/{tasks}"'
    return f"""#!/bin/bash
{chr(10).join(options)}

# One share of `{step.verb}` per task. What is finished is skipped, so any task may be run again, also by hand:
#   SLURM_ARRAY_TASK_ID=1 bash {shlex.quote(str(folder / f"{step.verb}.sh"))}

cd {shlex.quote(os.getcwd())} || exit 2
{chr(10).join([*before, *params.setup])}
folder={shlex.quote(str(folder))}
task="{step.verb} ${{SLURM_ARRAY_TASK_ID:-1}}"
tries=${{SLURM_RESTART_COUNT:-0}}
export PIPELINE_SUBMITTED_BY={NAME}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"  # one process per core already

note() {{ echo "$task $tries $1 $(hostname) $(date -u +%Y-%m-%dT%H:%M:%SZ)" >>"$folder/ends"; }}

if [ -e "$folder/refused" ]; then
  echo "a step before was refused; see its logs"
  note 3
  exit 3
fi

# walltime, preemption: the command gives back what is under way, keeps what is whole, and ends with 143
asked=
trap 'asked=1; kill -TERM "$child" 2>/dev/null' USR1 TERM
{command} {share} &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do  # a trap ends `wait` before the command has ended
  wait "$child"
  code=$?
done

again() {{
  [ -n "${{SLURM_JOB_ID:-}}" ] && [ "$tries" -lt "$1" ] || return 1
  case "$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null)" in
    *JobState=RUNNING*) ;;
    *) return 1 ;;  # cancelled, so somebody wants it gone; or preempted or past its walltime, which SLURM sees to
  esac
  note "requeued:$code"
  scontrol requeue "$SLURM_JOB_ID"
}}
if [ -n "$asked" ] && [ "$code" -gt 128 ]; then
  again {params.requeues} && exit 0
elif [ "$code" -gt 128 ]; then
  again {params.restarts} && exit 0  # its process was killed from outside: out of memory, or by hand
elif [ "$code" -ge 2 ]; then
  touch "$folder/refused"  # the next steps must not go on with outputs of other settings
fi
note "$code"
exit "$code"
"""


def _one_line(value: str) -> str:
    _quoted(value)
    return value


def _quoted(value: str) -> str:
    """A value as `#SBATCH` lines want it: quoted where it holds blanks. Raises LookupFailed for one of two lines."""
    if not value.isprintable():
        raise lookup.LookupFailed(f"slurm: {value!r} cannot stand in a job script: it must be one line of plain text")
    return f'"{value}"' if any(c.isspace() for c in value) else value


def _program(params: Params, of: Resources, work: Path, step: Step) -> str:
    if not params.container:
        # -P: the folder it is started in must not stand before the program
        return f"{shlex.quote(sys.executable)} -P -m mhim.pipeline"
    paths = [a for a in step.args if a.startswith("/")]
    paths += [os.path.dirname(file) for _, file in sorted(trust.current().files)]  # own plug-ins
    parts = ["apptainer", "exec", *(["--nv"] if of.gpus else [])]
    for bind in dict.fromkeys([str(work), os.getcwd(), *paths, *params.bind]):
        parts += ["--bind", bind]
    return shlex.join([*parts, params.container, "pipeline"])


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Stopped(f"{command[0]} does not answer: {error}") from error
    if done.returncode != 0:
        raise Stopped(f"{command[0]} refuses: {' '.join(done.stderr.split())}")
    return done.stdout


# ---------------------------------------------------------------------------------------------- looking


def look(states: list[ArrayState]) -> str:
    """What `squeue` says of the tasks of these arrays; "" or why it cannot be asked."""
    if shutil.which("squeue") is None:
        return "there is no `squeue` on this machine"
    by_job = {state.array.job: state for state in states}
    for line in _said(["squeue", "-h", "-r", "-o", "%F|%K|%T|%N|%r", "--me"]).splitlines():
        job, task, state, node, reason = line.split("|", 4)
        if job in by_job and task.isdigit():
            array = by_job[job]
            array.ended.pop(int(task), None)  # it was started again
            if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"):
                array.waiting[int(task)] = reason
            else:
                array.running[int(task)] = node
    return ""
