"""Seconds and memory of one training step and of scoring, per student and bag size.

    python -m tests.benchmarks.train                        one thread, N = 1k ... 50k
    python -m tests.benchmarks.train --threads 0            all cores
    python -m tests.benchmarks.train --device cuda          a GPU; any wait for the host inside a step is an error, and
                                                            `loop` and `unkept` are a step of the whole training loop,
                                                            fed with bags kept in RAM or read anew, over a bare one

A step is teacher, student forward and backward, Adam, EMA, at the settings of the figures printed beside it (D = 1024,
width 512, r_h 0.03, keep 0.9, k 10, published losses); `default` is the repaired form of configs/mhim.yaml, `plain` the
bare student. On a CPU each cell runs in a process of its own, so that memory is its own. `products` are the matrix
products that the MHIM step cannot avoid, as bare calls in the same process: the ratio to them does not depend on the
machine; `peer` are the published program's seconds on one core of another machine, so that ratio does. `+tokens` scores
with the default's tokens of the whole bag. `machine` is the time of the bare embedding product here over that which the
peer's abmil step implies (two thirds of it are 2.94 such products): divide a ratio by it to compare programs
rather than machines; above 1 this machine is the slower one. Of several repetitions the fastest counts, in processor
seconds on one thread (other people's work on the machine hardly enters them), else by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DIM, WIDTH = 1024, 512
STUDENTS = ("abmil", "dsmil", "transmil")
SIZES = (1000, 5000, 10000, 20000, 50000)
# MHIM step, plain step, scoring (s) and memory added by the MHIM step (MB) of the published program, one thread
PEER = {
    ("abmil", 1000): (0.068, 0.039, 0.015, 70),
    ("abmil", 5000): (0.305, 0.184, 0.075, 189),
    ("abmil", 10000): (0.631, 0.358, 0.151, 342),
    ("abmil", 20000): (1.61, 0.831, 0.321, 521),
    ("dsmil", 1000): (0.107, 0.065, 0.021, 75),
    ("dsmil", 5000): (0.434, 0.290, 0.116, 206),
    ("dsmil", 10000): (0.867, 0.540, 0.219, 352),
    ("dsmil", 20000): (2.15, 1.30, 0.483, 611),
    ("transmil", 1000): (1.20, 0.94, 0.33, 430),
    ("transmil", 5000): (3.73, 3.10, 1.13, 915),
    ("transmil", 10000): (7.80, 6.57, 2.17, 1509),
    ("transmil", 20000): (17.3, 13.7, 4.43, 2376),
}
PUBLISHED = {
    "mask_ratio_h": 0.03,
    "keep_ratio": 0.9,
    "merge_k": 10,
    "merge": "mca",
    "score": "probability",
    "share_max": 1.0,
    "order": "shuffled",
    "min_kept": 0,
    "consistency": "embedding",
    "teacher": "ema",
    "teacher_mode": "train",
    "student_start": "fresh",
}


def product_shapes(student: str, n: int) -> list[tuple[int, int, int, int]]:
    """(batch, rows, inner, columns) of the products of one MHIM step: teacher once, student once forward and twice
    backward (once for the embedding, whose input needs no gradient). Transmil's second layer answers for the class
    token alone: keys and their attention for all, values for what it reads."""
    h, kept = WIDTH, int(0.97 * n)
    once = [(1, n, DIM, h), (1, kept, DIM, h), (1, h, kept, DIM)]

    def thrice(shapes: Callable[[int], list[tuple[int, int, int, int]]]) -> list[tuple[int, int, int, int]]:
        return shapes(n) + 3 * shapes(int(0.9 * kept) + 10)

    if student == "abmil":
        return once + thrice(lambda m: [(1, m, h, 128)])
    if student == "dsmil":
        return once + thrice(lambda m: [(1, m, h, 128), (1, m, 128, 128), (1, m, h, h)])
    attend = [(8, 256, 64), (8, 64, 256)]

    def layers(m: int) -> list[tuple[int, int, int, int]]:
        attention = [(b, m, k, c) for b, k, c in attend for _ in range(2)]
        return [(1, m, h, 3 * h), (1, m, h, h), (1, m, h, h), *attention, (8, m, 64, 256)]

    return once + thrice(layers)


def cell(student: str, n: int, threads: int, device: str, repeats: int) -> dict[str, float]:
    """Measure one student at one size."""
    import torch

    from mhim.configs import lookup
    from mhim.configs.schema import TrainConfig
    from mhim.mil import tasks, train
    from mhim.mil.feed import Case
    from mhim.mil.memory import keep_freed
    from mhim.mil.models import MIL, Bag

    keep_freed()  # as the trainer does
    torch.set_num_threads(threads)
    cuda = device == "cuda"
    task = tasks.Classification(classes=("no", "yes"))
    module = lookup.find("mhim.mil.models", "mhim")
    generator = torch.Generator().manual_seed(0)
    side = int(n**0.5) + 1
    place = torch.arange(n)
    bag = Bag(
        torch.randn(1, n, DIM, generator=generator).to(device),
        torch.ones(1, n, dtype=torch.bool, device=device),
        torch.stack([place % side, place // side], 1)[None].float().mul(256).to(device),
        torch.tensor([256.0], device=device),
        0.5,
        (n,),
    )
    target = torch.tensor([1], device=device)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.process_time() if threads == 1 and not cuda else time.perf_counter()

    def best(work: Callable[[], object], times: int = repeats) -> float:
        found = []
        for _ in range(times):
            began = clock()
            work()
            found.append(clock() - began)
        return min(found)

    def stepper(model: MIL, bag: Bag = bag) -> Callable[[], None]:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-5)
        model.train()

        def step() -> None:
            if cuda:
                torch.cuda.set_sync_debug_mode("error")
            torch.stack(list(model.losses(bag, target, task).values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step()
            if cuda:
                torch.cuda.set_sync_debug_mode("default")

        return step

    def fed(kept: bool) -> float:
        """Seconds a step of the training loop takes: bags of float16 to the device, one look at the losses per epoch,
        and what is kept after it."""
        count = max(8, 200_000 // n)
        x = bag.features[0].half().cpu().numpy()
        place = bag.coords[0].int().cpu().numpy()
        data = [Case(str(i), (str(i),), i % 2, lambda: (x, place, 256.0)) for i in range(count)]
        config = TrainConfig(epochs=3, patience=0, select="last", standardize=False, cache_gb=40.0 if kept else 0.0)
        times = [clock()] + [clock() for _ in train.fit(published, data, [], task, config, 0)]
        return (times[-1] - times[-2]) / count

    def memory(which: str) -> float:
        """Megabytes held now ("VmRSS"), or at most since (Linux: since the last call; "VmHWM")."""
        if cuda:
            held = torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return held / 2**20
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        return int(status[which].split()[0]) / 1024

    found = {}
    shapes = product_shapes(student, n)
    torch.manual_seed(0)
    published = module.build(DIM, 2, lookup.params(module, PUBLISHED | {"student": student})).to(device)
    # What libraries and the backward pass's thread take once is not the step's: use them on a small bag first.
    few = slice(0, 64)
    small = Bag(bag.features[:, few], bag.mask[:, few], bag.coords[:, few], bag.tile_l0, 0.5, (64,))
    stepper(module.build(DIM, 2, lookup.params(module, PUBLISHED | {"student": student})).to(device), small)()
    before = memory("VmRSS")
    step = stepper(published)
    step()
    found["step_mb"] = memory("VmHWM") - before
    found["step"] = best(step)
    if cuda:  # the loop allows deterministic kernels only; the bare step above takes the fastest
        found["loop"], found["unkept"] = fed(True), fed(False)
    default = module.build(DIM, 2, lookup.params(module, {"student": student})).to(device)
    found["default"] = best(stepper(default), repeats + 1)
    default.eval()
    with torch.inference_mode():
        found["tokens"] = best(lambda: default(bag), repeats + 1)
    plain = default.student
    found["plain"] = best(stepper(plain), repeats + 1)
    plain.eval()
    with torch.inference_mode():
        found["score"] = best(lambda: plain(bag), repeats + 1)
        a, b = bag.features[0], torch.randn(DIM, WIDTH, device=device)
        found["embedding"] = best(lambda: a @ b, repeats + 1)
        operands = [(torch.randn(b, m, k, device=device), torch.randn(b, k, c, device=device)) for b, m, k, c in shapes]
        found["products"] = best(lambda: [torch.bmm(x, y) for x, y in operands], 2)
    return found


def heading(peers: bool, cuda: bool) -> str:
    """First line of the table."""
    line = (
        f"{'student':9} {'N':>6} {'MHIM s':>8} {'default':>8} {'plain':>8} {'score':>8} {'+tokens':>8} "
        f"{'products':>8} {'MHIM/prod':>9} {'MB added':>8}"
    )
    return (
        line
        + (f" | {'to peer: MHIM':>13} {'plain':>6} {'score':>6} {'MB':>6} {'machine':>7}" if peers else "")
        + (f" | {'loop/step':>9} {'unkept':>6}" if cuda else "")
    )


def row(student: str, n: int, f: dict[str, float], peers: bool) -> str:
    """One line of the table."""
    line = (
        f"{student:9} {n:6d} {f['step']:8.4f} {f['default']:8.4f} {f['plain']:8.4f} {f['score']:8.4f} "
        f"{f['tokens']:8.4f} {f['products']:8.4f} {f['step'] / f['products']:9.2f} {f['step_mb']:8.0f}"
    )
    if "loop" in f:
        line += f" | {f['loop'] / f['step']:9.2f} {f['unkept'] / f['step']:6.2f}"
    if not peers or (student, n) not in PEER:
        return line
    step, plain, score, mb = PEER[student, n]
    return line + (
        f" | {f['step'] / step:13.2f} {f['plain'] / plain:6.2f} {f['score'] / score:6.2f} "
        f"{f['step_mb'] / mb:6.2f} {f['embedding'] / (2 / 3 * PEER['abmil', n][0] / (1 + 2 * 0.97)):7.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="measure one cell here and print it as JSON")
    a = parser.parse_args()
    threads = a.threads or os.cpu_count() or 1
    if a.one:
        print(json.dumps(cell(a.students[0], a.sizes[0], threads, a.device, a.repeats)))
        return
    peers = a.device == "cpu" and threads == 1
    print(heading(peers, a.device == "cuda"), flush=True)
    for student in a.students:
        for n in a.sizes:
            if a.device == "cuda":  # its memory is counted by the allocator: no need of a process of its own
                print(row(student, n, cell(student, n, threads, a.device, a.repeats), peers), flush=True)
                continue
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.train",
                "--one",
                "--students",
                student,
                "--sizes",
                str(n),
                "--threads",
                str(threads),
                "--device",
                a.device,
                "--repeats",
                str(a.repeats),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{student:9} {n:6d} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            print(row(student, n, json.loads(done.stdout.splitlines()[-1]), peers), flush=True)


if __name__ == "__main__":
    main()
