"""The training loop: a generator of epoch states, resumable from any of them. No file, no model name.

In: a model of the contract, training and validation cases, a task, settings and a seed. Out: after each epoch the
complete state as tensors and plain values; from it the loop goes on to the same bytes as if it had never stopped.
Randomness, thread count and the deterministic flag are the loop's own during an epoch and given back at each yield,
so that nothing outside changes a result and nothing outside is changed.

Learning rate and the order of bags are functions of the epoch, and bfloat16 needs no loss scaler; so what has to be
saved is: model (with its teacher), optimiser, random states, Cox memory, early stopping, best weights, history.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.schema import TrainConfig
from mil import metrics
from mil.feed import Case, Feed, Scale, moments, shuffled
from mil.memory import keep_freed
from mil.models import MILModel
from mil.tasks import Task

LR_MIN, LR_WARM = 1e-7, 1e-6  # of the published schedule: end of the cosine, start of the warm-up
FORMAT = 1

State = dict[str, Any]
_filling: Any = torch.utils.deterministic  # its switch is a property that no type stub knows


class TrainingDiverged(ArithmeticError):
    """The loss is no longer a number; the last state yielded is still good."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one case.

    logits: float32 (n_out,). scores: float32 (N,) per tile. evidence: float32 (N, n_out) or None.
    """

    case: Case
    logits: np.ndarray
    scores: np.ndarray
    evidence: np.ndarray | None


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch, from 0: linear from 1e-6 over the warm-up, then cosine to 1e-7, or constant."""
    if epoch < config.warmup_epochs:
        return LR_WARM + (config.lr - LR_WARM) * epoch / config.warmup_epochs
    if config.schedule == "constant":
        return config.lr
    return LR_MIN + 0.5 * (config.lr - LR_MIN) * (1.0 + math.cos(math.pi * epoch / config.epochs))


def fit(
    model: MILModel, train_cases: Sequence[Case], val_cases: Sequence[Case], task: Task, config: TrainConfig,
    seed: int, start: State | None = None,
) -> Iterator[State]:
    """Train `model` in place and yield the complete state after each epoch, until done.

    start: a state this generator yielded before, to go on from; nothing is yielded if it was the last.
    val_cases may be empty, then the last epoch is kept. Raises TrainingDiverged and mil.feed.BagError.
    The state holds tensors (on the CPU) and plain values only, so torch.load(weights_only=True) reads it.
    """
    keep_freed()
    net = _module(model)
    device = next(net.parameters()).device
    plain = Feed(train_cases, task, device, config.cache_gb * 2**30, max_tiles=config.max_tiles)
    scale: Scale | None = None
    if start is not None:
        if start["format"] != FORMAT:
            raise ValueError(f"the checkpoint has format {start['format']}, this program {FORMAT}: start again")
        net.load_state_dict(start["model"])
        scale = scale_of(start)
    elif config.standardize:
        scale = moments(plain)
    plain.scale = scale
    val = Feed(val_cases, task, device, config.cache_gb * 2**30 / 4, scale)
    optimizer = _optimizer(net, config)
    if start is not None:
        optimizer.load_state_dict(start["optimizer"])
        random, memory = start["random"], start["memory"]
        best, stale, history, first = start["best"], start["stale"], list(start["history"]), start["epoch"] + 1
        if start["done"]:
            return
    else:
        with seeded(seed):
            random = _random_states(device)
        memory, best, stale, history, first = None, None, 0, [], 0
    for epoch in range(first, config.epochs):
        with isolated(random, device, config.threads) as box:
            row, memory = _epoch(model, plain, task, config, optimizer, seed, epoch, memory)
            if len(val_cases):
                row |= {f"val_{k}": v for k, v in evaluate(model, val, task).items()}
        random = box["random"]
        history.append(row)
        if best is None or config.select == "last" or not len(val_cases) or _better(row, best["row"], task):
            best = {"row": row, "epoch": epoch, "weights": _snapshot(net.state_dict())}
            stale = 0
        else:
            stale += 1
        stopping = 0 < config.patience <= stale and epoch + 1 >= config.min_epochs
        yield {
            "format": FORMAT, "epoch": epoch, "model": _snapshot(net.state_dict()),
            "optimizer": _snapshot(optimizer.state_dict()), "random": random, "memory": _snapshot(memory), "best": best,
            "stale": stale, "history": list(history), "done": stopping or epoch + 1 == config.epochs,
            "scale": None if scale is None else {"mean": torch.from_numpy(scale[0]), "sd": torch.from_numpy(scale[1])},
        }
        if stopping:
            return


def scale_of(state: State) -> Scale | None:
    """Mean and sd with which a state's model standardises its features, or None."""
    kept = state["scale"]
    return None if kept is None else (kept["mean"].numpy(), kept["sd"].numpy())


def predict(
    model: MILModel, cases: Sequence[Case], task: Task, scale: Scale | None = None, max_tiles: int = 0, seed: int = 0,
) -> Iterator[Prediction]:
    """What `model` says of each case, in order, with every tile (or a random `max_tiles` of them), in eval mode."""
    keep_freed()
    device = next(_module(model).parameters()).device
    feed = Feed(cases, task, device, scale=scale, max_tiles=max_tiles)
    yield from _predictions(model, feed, (seed,) if max_tiles else None)


def evaluate(model: MILModel, feed: Feed, task: Task) -> dict[str, float]:
    """Loss in inference mode and the task's headline metric over all cases of `feed`."""
    found = list(_predictions(model, feed, None))
    logits = torch.from_numpy(np.stack([p.logits for p in found]).astype(np.float64))
    values = [c.target for c in feed.cases if c.target is not None]
    target = task.target(values)
    loss = float(task.with_memory(None).loss(logits, target))
    if task.survival:
        headline = metrics.c_index(target[:, 0].numpy(), target[:, 1].numpy(), task.risk(logits).numpy())
    else:
        headline = metrics.auc(target.numpy(), task.probabilities(logits).numpy())
    return {"loss": loss, task.headline: headline}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers follow `seed` inside, and are as before outside. Build models in it."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def isolated(random: State | None, device: torch.device, threads: int) -> Iterator[dict[str, Any]]:
    """Own random states, deterministic kernels and thread count inside; the states reached are in box["random"]."""
    outer = _random_states(device)
    flags = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    fills = _filling.fill_uninitialized_memory
    box: dict[str, Any] = {}
    try:
        torch.use_deterministic_algorithms(True)
        _filling.fill_uninitialized_memory = False  # nothing is read before it is written
        torch.set_num_threads(threads)
        if random is not None:
            _set_random(random, device)
        yield box
        box["random"] = _random_states(device)
    finally:
        _set_random(outer, device)
        torch.use_deterministic_algorithms(flags[0])
        _filling.fill_uninitialized_memory = fills
        torch.set_num_threads(flags[1])


def _epoch(
    model: MILModel, feed: Feed, task: Task, config: TrainConfig, optimizer: torch.optim.Optimizer, seed: int,
    epoch: int, memory: Tensor | None,
) -> tuple[dict[str, Any], Tensor | None]:
    """One pass over the training cases: its row of the history, and the Cox memory it leaves."""
    net = _module(model)
    net.train()
    device = next(net.parameters()).device
    lr = learning_rate(config, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    order = shuffled(feed.cases, config.batch_bags, config.balance == "sampling", seed, epoch)
    seen: list[dict[str, Tensor]] = []
    optimizer.zero_grad(set_to_none=True)
    for n, batch in enumerate(feed.batches(order, key=(seed, epoch))):
        assert batch.target is not None
        model.set_progress((epoch + n / len(order)) / config.epochs)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.amp):
            named = model.losses(batch.bag, batch.target, task.with_memory(memory) if task.kind == "cox" else task)
            total = functools.reduce(torch.add, [v.float() for v in named.values()])
        # the last steps of an epoch may be fewer than `accumulate`: each still weighs 1 / (steps added up)
        together = min(config.accumulate, len(order) - n // config.accumulate * config.accumulate)
        (total if together == 1 else total / together).backward()
        if (n + 1) % config.accumulate == 0 or n + 1 == len(order):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step()
        if task.kind == "cox":
            memory = _remember(model, batch.bag, batch.target, memory, config.cox_bags)
        seen.append({k: v.detach() for k, v in named.items()} | {"loss": total.detach()})
    # One look at the losses per epoch: a look per step would make a GPU wait for the host.
    means: dict[str, Any] = {"epoch": epoch, "lr": lr}
    for name in seen[0]:
        values = torch.stack([s[name].double() for s in seen]).cpu()
        if not torch.isfinite(values).all():
            step = int(torch.nonzero(~torch.isfinite(values))[0])
            who = ", ".join(feed.cases[i].patient for i in order[step])
            raise TrainingDiverged(
                f"the loss {name!r} became {float(values[step])} in epoch {epoch + 1} at patient {who} "
                f"(step {step + 1}); the state after the epoch before is kept. "
                "Lower train.lr, or standardise the features (train.standardize=true)")
        means[name] = float(values.mean())
    return means, memory


def _remember(model: MILModel, bag: Any, target: Tensor, memory: Tensor | None, size: int) -> Tensor:
    """The Cox memory with this step's bags added: [log risk in inference mode, time, event], newest last."""
    net = _module(model)
    with torch.no_grad():
        net.eval()
        risk = model(bag).logits[:, :1].double()
        net.train()
    new = torch.cat([risk, target.double()], dim=1)
    return new[-size:] if memory is None else torch.cat([memory.to(new), new])[-size:]


def _predictions(model: MILModel, feed: Feed, key: tuple[int, ...] | None) -> Iterator[Prediction]:
    net = _module(model)
    was_training = net.training
    net.eval()
    try:
        for batch in feed.batches(feed.in_turn(), key):
            with torch.inference_mode():
                out = model(batch.bag)
            for b, case in enumerate(batch.cases):
                real = batch.bag.mask[b]
                yield Prediction(
                    case, out.logits[b].float().cpu().numpy(), out.scores[b][real].float().cpu().numpy(),
                    None if out.evidence is None else out.evidence[b][real].float().cpu().numpy())
    finally:
        net.train(was_training)


def _better(row: dict[str, Any], best: dict[str, Any], task: Task) -> bool:
    """Whether validation prefers `row`: a larger headline metric, or the same one at a smaller loss.

    Ties are common: ten validation patients know few values of an AUC."""

    def rank(r: dict[str, Any]) -> tuple[float, float]:
        headline = r[f"val_{task.headline}"]
        return (headline if math.isfinite(headline) else -math.inf, -r["val_loss"])

    return rank(row) > rank(best)


def _optimizer(net: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    made = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    trained = [p for p in net.parameters() if p.requires_grad]
    # one kernel for all parameters: a third of the time of a step on a small bag was the optimiser's Python loop
    return made(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _random_states(device: torch.device) -> State:
    states: State = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random(states: State, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _snapshot(value: Any) -> Any:
    """A copy on the CPU that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: _snapshot(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_snapshot(v) for v in value]
    return value


def _module(model: MILModel) -> torch.nn.Module:
    assert isinstance(model, torch.nn.Module)
    return model
