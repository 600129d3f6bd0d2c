"""Chaos: what can happen to a work folder, at random, and what must hold afterwards. Run it by hand for long:

    python -m tests.benchmarks.chaos --rounds 200 --seed 1        # prints a line per round, exits 1 at a broken promise
    python -m tests.benchmarks.chaos --only 17 --seed 1 --keep    # one round again, its folder kept

A round takes one verb of a tiny cohort (six slides of 512 px), does one to three of these to it, then gives the command
once more, undisturbed:

- kill: SIGKILL, SIGTERM or Ctrl-C after a random time;
- stop: SIGSTOP past the lease while a second command works, then SIGCONT;
- clock: claims that are years old or from the future;
- equal: two or three commands at once;
- other: a command with other settings at the same time;
- full: a file system that is full after some more KiB;
- damage: a file of a finished output cut short, flipped, zeroed or gone, or an output half-copied.

Then must hold: the last command's exit code is 0 and the outputs are, byte by byte, those of an undisturbed run
(`store/may_differ.py`); nothing private is left; all outputs have the same settings and their slides are in the cohort;
no command ended with a traceback, with "a fault of the program", or with a code that its outputs deny.
`pipeline verify`, where there is one, finds exactly what was damaged.

Commands are forked from this process, which has imported everything, so that a round takes seconds. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mhim.pipeline.store import may_differ
from tests.benchmarks.chaos_world import LEASE_S, VERBS, Broken, Command, World


def beginning(world: World, verb: str, work: Path) -> None:
    """The work folder as it is before `verb`."""
    before = VERBS.index(verb)
    if before:
        shutil.copytree(world.calm[VERBS[before - 1]], work, symlinks=True, dirs_exist_ok=True)
    else:
        work.mkdir(parents=True, exist_ok=True)


# ----------------------------------------------------------------------------- what can happen


def kill(world: World, verb: str, work: Path, rng: random.Random) -> list[Command]:
    """The command, killed up to three times at random moments."""
    commands = []
    for _ in range(rng.randint(1, 3)):
        command = world.start(work, verb, workers=rng.choice((1, 1, 1, 2)))
        time.sleep(rng.uniform(0.0, 1.1) * world.seconds[verb])
        command.send(rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
        command.wait()
        commands.append(command)
    return commands


def stop(world: World, verb: str, work: Path, rng: random.Random) -> list[Command]:
    """A command that sleeps past its lease while another one works, and wakes before, or after the other's end."""
    slept = world.start(work, verb)
    time.sleep(rng.uniform(0.1, 0.9) * world.seconds[verb])
    slept.send(signal.SIGSTOP)
    time.sleep(rng.uniform(0.5, 2.0) * LEASE_S)
    second = world.start(work, verb)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.0, 1.0) * world.seconds[verb])
    else:
        second.wait()
    slept.send(signal.SIGCONT)
    slept.wait()
    second.wait()
    return [slept, second]


def clock(world: World, verb: str, work: Path, rng: random.Random) -> list[Command]:
    """Two commands, while the times of claims jump."""
    both = [world.start(work, verb), world.start(work, verb)]
    until = time.monotonic() + world.seconds[verb]
    while time.monotonic() < until and not all(c.over() for c in both):
        for claim in claims(work):
            at = time.time() + rng.choice((-1e8, -5.0, 5.0, 1e8))
            try:
                os.utime(claim, (at, at))
            except FileNotFoundError:
                continue
        time.sleep(rng.uniform(0.005, 0.05))
    for command in both:
        command.wait()
    for claim in claims(work):  # the clock is right again
        os.utime(claim)
    return both


def claims(work: Path) -> list[Path]:
    """The claims that lie there; folders may vanish meanwhile, which `os.walk` passes over."""
    return [Path(place, name) for place, _, names in os.walk(work) if place.endswith(".claims") for name in names]


def equal(world: World, verb: str, work: Path, rng: random.Random) -> list[Command]:
    """Two or three commands of the same settings; one may be killed."""
    team = []
    for _ in range(rng.randint(2, 3)):
        team.append(world.start(work, verb))
        time.sleep(rng.choice((0.0, rng.uniform(0.0, 0.5) * world.seconds[verb])))
    if rng.random() < 0.3:
        rng.choice(team).send(signal.SIGKILL)
    for command in team:
        command.wait()
    return team


def other(world: World, verb: str, work: Path, rng: random.Random) -> list[Command]:
    """Two commands of other settings at once: outputs of one of them only, and the other one says so."""
    first = rng.random() < 0.5
    team = [world.start(work, verb, other=first)]
    time.sleep(rng.choice((0.0, rng.uniform(0.0, 0.6) * world.seconds[verb])))
    team.append(world.start(work, verb, other=not first))
    codes = [command.wait() for command in team]
    made = one_fingerprint(work, verb)
    if codes == [0, 0] and made > 1:
        raise Broken(f"two {verb} of other settings both ended with 0")
    return team


def full(world: World, verb: str, work: Path, rng: random.Random) -> list[Command]:
    """The file system is full after some more KiB: one line, exit code 1, and going on when there is room."""
    if os.geteuid() != 0:
        return []
    mounted = work.with_name(work.name + "-small")
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mounted)], check=False, capture_output=True
    ).returncode:
        mounted.rmdir()
        return []
    try:
        shutil.copytree(work, mounted / "w", symlinks=True)
        room = rng.choice((0, 4096, 30_000, 200_000))
        with open(mounted / "filler", "wb", buffering=0) as filler:
            filler.write(b"\0" * max(0, shutil.disk_usage(mounted).free - room))
        command = world.start(mounted / "w", verb)
        code, said = command.wait(), command.said()
        lines = [line for line in said.splitlines() if "cannot write" in line]
        refused = code == 3 and "other parameters" in said  # of another command before
        if code != 0 and not refused and (code != 1 or len(lines) != 1 or "the disk is full" not in said):
            raise Broken(f"{verb} on a full disk ended with {code}: {said}")
        (mounted / "filler").unlink()
        shutil.rmtree(work)
        shutil.copytree(mounted / "w", work, symlinks=True)
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)
        mounted.rmdir()
    return [command]


def damage(world: World, verb: str, work: Path, rng: random.Random) -> list[Command]:
    """A finished output is damaged; `verify` names exactly it, and `--repair` lets the command make it anew."""
    world.start(work, verb).wait()
    if not world.verify:
        return []
    below = {"tile": "tiles", "extract": "features", "train": "runs/abmil", "score": "runs/abmil/scores"}[verb]
    files = sorted(p for p in (work / below).rglob("*") if p.is_file() and _of_an_output(p.relative_to(work)))
    hurt = rng.choice(files)
    data = hurt.read_bytes()
    how = rng.choice(("cut", "flip", "zero", "gone", "half"))
    if how == "cut":
        hurt.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        at = rng.randrange(len(data)) if data else 0
        hurt.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"x")
    elif how == "zero":
        hurt.write_bytes(bytes(len(data)) if any(data) else b"\1" * max(1, len(data)))
    elif how == "gone":
        hurt.unlink()
    else:  # a copy that was cut short: everything after this file in the order of names is missing
        root = _output_of(hurt, work)
        for later in sorted(p for p in root.rglob("*") if p.is_file() and p >= hurt):
            later.unlink()
    store = _output_of(hurt, work)
    first = world.run(work, "verify", "--work", str(work))
    if first.wait() != 1 or store.name.removesuffix(".zarr") not in first.said():
        raise Broken(f"verify after {how} of {hurt.relative_to(work)}: {first.wait()}: {first.said()}")
    again = world.run(work, "verify", "--repair", "--work", str(work))
    return [first, again]


HAPPENINGS: dict[str, Callable[[World, str, Path, random.Random], list[Command]]] = {
    "kill": kill,
    "stop": stop,
    "clock": clock,
    "equal": equal,
    "other": other,
    "full": full,
    "damage": damage,
}


def _of_an_output(name: Path) -> bool:
    """Whether the file is part of a sealed output."""
    return any(part.endswith(".zarr") or part.startswith("fold_") for part in name.parts)


def _output_of(file: Path, work: Path) -> Path:
    return next(p for p in file.parents if p.name.endswith(".zarr") or p.name.startswith("fold_"))


# ----------------------------------------------------------------------------- what must hold


def outputs(work: Path, verb: str) -> Iterator[Path]:
    """Seals of the verb's finished outputs."""
    match verb:
        case "tile":
            yield from work.glob("tiles/*.zarr/zarr.json")
        case "extract":
            yield from work.glob("features/*/*.zarr/zarr.json")
        case "train":
            yield from work.glob("runs/abmil/fold_*/manifest.json")
        case "score":
            yield from work.glob("runs/abmil/scores/*.zarr/zarr.json")


def one_fingerprint(work: Path, verb: str) -> int:
    """How many outputs there are; Broken if their settings (not inputs) are not all the same."""
    found = []
    for seal in outputs(work, verb):
        parsed = json.loads(seal.read_text())
        settings = parsed.get("attributes", parsed)["settings"]
        found.append({k: v for k, v in settings.items() if not k.startswith("input.")})
    if any(settings != found[0] for settings in found):
        raise Broken(f"{verb}: outputs of several settings lie side by side")
    return len(found)


def honest(command: Command) -> None:
    """What a command said and how it ended fit together."""
    said, code = command.said(), command.wait()
    if "Traceback" in said or "a fault of the program" in said:
        raise Broken(f"{' '.join(command.args)} ended with {code}:\n{said}")
    if code not in (0, 1, 3, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
        raise Broken(f"{' '.join(command.args)} ended with {code}:\n{said}")


def check(world: World, verb: str, work: Path, as_other: bool) -> None:
    """The same command again, undisturbed, and every promise."""
    last = world.start(work, verb)
    code = last.wait()
    honest(last)
    if as_other and code == 3:  # the other settings were first: theirs are what must be whole
        last = world.start(work, verb, other=True)
        code = last.wait()
        honest(last)
        if code != 0:
            raise Broken(f"{verb}: neither of two settings goes on: {code}\n{last.said()}")
    elif code != 0:
        raise Broken(f"{verb}, given again, ended with {code}:\n{last.said()}")
    else:
        compare(world.calm[verb], work)
    if left := may_differ.unfinished(work):
        raise Broken(f"left behind: {left}")
    one_fingerprint(work, verb)
    cohort = (work / "cohort.csv").read_text()
    for store in (*work.glob("tiles/*.zarr"), *work.glob("features/*/*.zarr")):
        if f"{store.name.removesuffix('.zarr')}," not in cohort:
            raise Broken(f"{store} is not in cohort.csv")


def compare(calm: Path, work: Path) -> None:
    wanted, got = may_differ.results(calm), may_differ.results(work)
    more, less = sorted(got.keys() - wanted.keys()), sorted(wanted.keys() - got.keys())
    wrong = sorted(n for n in wanted.keys() & got.keys() if wanted[n] != got[n])
    if more or less or wrong:
        raise Broken(f"not the undisturbed outputs: more {more[:5]}, missing {less[:5]}, other bytes {wrong[:5]}")


def round_(world: World, seed: str, keep: bool = False, without: frozenset[str] = frozenset()) -> str:
    """One round; says what it was. without: what does not happen. Raises Broken."""
    rng = random.Random(seed)
    verb = rng.choice(VERBS)
    what = [rng.choice([h for h in HAPPENINGS if h not in without]) for _ in range(rng.choice((1, 1, 2, 3)))]
    told = f"{verb}: {', '.join(what)}"
    work = world.place / f"work-{seed.replace('/', '-')}"
    beginning(world, verb, work)
    try:
        for name in what:
            if name == "other" and one_fingerprint(work, verb):
                continue  # what is there decides already
            for command in HAPPENINGS[name](world, verb, work, rng):
                honest(command)
        check(world, verb, work, "other" in what)
    except Broken as broken:
        raise Broken(f"{told}: {broken}") from None
    if not keep:
        shutil.rmtree(work)
        shutil.rmtree(world.place / "logs")
    return told


def main() -> int:
    asks = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asks.add_argument("--rounds", type=int, default=200)
    asks.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after so long")
    asks.add_argument("--seed", default="1")
    asks.add_argument("--only", type=int, help="this round alone")
    asks.add_argument("--without", default="", help="leave these out: other,damage")
    asks.add_argument("--keep", action="store_true", help="keep the folders")
    given = asks.parse_args()
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    began, failed, done = time.monotonic(), 0, 0
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        world = World(place / "world")
        print(f"undisturbed: {', '.join(f'{v} {s:.1f} s' for v, s in world.seconds.items())}", flush=True)
        for n in range(given.rounds) if given.only is None else [given.only]:
            if time.monotonic() - began > given.seconds:
                break
            start = time.monotonic()
            done += 1
            try:
                told = round_(world, f"{given.seed}/{n}", given.keep, frozenset(given.without.split(",")))
                print(f"{n}: {told}, {time.monotonic() - start:.1f} s", flush=True)
            except Broken as broken:
                failed += 1
                print(f"{n}: BROKEN {broken}", flush=True)
        print(f"{done} rounds of seed {given.seed}, {failed} broken, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        if given.keep:
            print(f"kept: {place}")
        else:
            shutil.rmtree(place)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
