"""The training loop: a generator of states, resumable from any of them. No file, no model name.

In: a model of the contract, training and validation cases, a task, settings and a seed. Out: after each epoch, and
inside one whenever the caller asks for it, the complete state as tensors and plain values; from it the loop goes on to
the same bytes as if it had never stopped.
Randomness, thread count and the deterministic flag are the loop's own during an epoch and given back at each yield,
so that nothing outside changes a result and nothing outside is changed.

Learning rate and the order of bags are functions of the epoch, and bfloat16 needs no loss scaler; so what has to be
saved is: model (with its teacher), optimiser, random states, Cox memory, early stopping, best weights, history; and
inside an epoch how many steps of it are done and their losses. A state inside an epoch is offered after a step of the
optimiser only: no gradient is under way there, and a model holds nothing that its `state_dict` does not tell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhim.configs.errors import UserError
from mhim.configs.schema import TrainConfig
from mhim.mil.feed import Case, Feed, Scale, shuffled
from mhim.mil.memory import keep_freed
from mhim.mil.models import MILModel
from mhim.mil.parts.masking import cosine
from mhim.mil.scaling import chosen
from mhim.mil.tasks import Task

LR_MIN, LR_WARM = 1e-7, 1e-6  # of the published schedule: end of the cosine, start of the warm-up
FORMAT = 2  # 2: a state may lie inside an epoch; those of format 1 never do

State = dict[str, Any]
_filling: Any = torch.utils.deterministic  # its switch is a property that no type stub knows


class TrainingDiverged(UserError, ArithmeticError):
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
    model: MILModel,
    train_cases: Sequence[Case],
    val_cases: Sequence[Case],
    task: Task,
    config: TrainConfig,
    seed: int,
    start: State | None = None,
    due: Callable[[], bool] = lambda: False,
) -> Iterator[State]:
    """Train `model` in place and yield the complete state after each epoch, until done.

    due: asked after each step of the optimiser; where it says yes, the state inside the epoch is yielded too, with
    "within" set (after an epoch it is None) and "epoch" the last whole one, -1 before the first.
    start: a state this generator yielded before, to go on from; nothing is yielded if it was the last.
    val_cases may be empty, then the last epoch is kept. Raises TrainingDiverged and mhim.mil.feed.BagError.
    The state holds tensors (on the CPU) and plain values only, so torch.load(weights_only=True) reads it.
    """
    keep_freed()
    net = _module(model)
    device = next(net.parameters()).device
    plain = Feed(train_cases, task, device, config.cache_gb * 2**30, max_tiles=config.max_tiles)
    scale: Scale | None = None
    judged: State | None = None  # what train.standardize=auto found
    if start is not None:
        if start["format"] not in (1, FORMAT):
            raise ValueError(f"the checkpoint has format {start['format']}, this program {FORMAT}: start again")
        net.load_state_dict(start["model"])
        scale, judged = scale_of(start), start.get("judged")
    else:
        scale, judged = chosen(plain, config.standardize)
    plain.scale = scale
    val = Feed(val_cases, task, device, config.cache_gb * 2**30 / 4, scale)
    optimizer = _optimizer(net, config)
    within: State | None = None
    if start is not None:
        optimizer.load_state_dict(start["optimizer"])
        random, memory, within = start["random"], start["memory"], start.get("within")
        best, stale, history, first = start["best"], start["stale"], list(start["history"]), start["epoch"] + 1
        if start["done"]:
            return
    else:
        with seeded(seed):
            random = _random_states(device)
        memory, best, stale, history, first = None, None, 0, [], 0
        for feed, step in ((plain, "prepare"), (val, "calibrate")):
            _prepare(model, feed, task, config.threads, seed, step)

    def state(epoch: int, within: State | None, done: bool) -> State:
        return {
            "format": FORMAT,
            "epoch": epoch,
            "within": within,
            "model": _snapshot(net.state_dict()),
            "optimizer": _snapshot(optimizer.state_dict()),
            "random": random,
            "memory": _snapshot(memory),
            "best": best,
            "stale": stale,
            "history": list(history),
            "done": done,
            **({} if judged is None else {"judged": judged}),
            "scale": None if scale is None else {"mean": torch.from_numpy(scale[0]), "sd": torch.from_numpy(scale[1])},
        }

    for epoch in range(first, config.epochs):
        one = _Epoch(model, plain, task, config, optimizer, seed, epoch, memory, within)
        within, paused = None, True
        while paused:
            with isolated(random, device, config.threads) as box:
                paused = one.run(due)
            random, memory = box["random"], one.memory
            if paused:
                yield state(epoch - 1, one.within(), False)
        row = one.means()
        if len(val_cases):
            with isolated(random, device, config.threads) as box:
                row |= {f"val_{k}": v for k, v in evaluate(model, val, task).items()}
            random = box["random"]
        history.append(row)
        if best is None or config.select == "last" or not len(val_cases) or _better(row, best["row"], task):
            best = {"row": row, "epoch": epoch, "weights": _snapshot(net.state_dict())}
            stale = 0
        else:
            stale += 1
        stopping = 0 < config.patience <= stale and epoch + 1 >= config.min_epochs
        yield state(epoch, None, stopping or epoch + 1 == config.epochs)
        if stopping:
            return


def _prepare(model: MILModel, feed: Feed, task: Task, threads: int, seed: int, step: str) -> None:
    """`step` of the model before its first, with the bags of `feed`; the random states stay as they are."""
    net = _module(model)
    if hasattr(net, step):  # own code of before there was such a step has none
        net.eval()
        with isolated(None, feed.device, threads), torch.no_grad(), seeded(seed):
            batches = feed.batches(feed.in_turn(), (seed,) if feed.max_tiles else None)
            getattr(model, step)(((b.bag, b.target) for b in batches if b.target is not None), task)


def scale_of(state: State) -> Scale | None:
    """Mean and sd with which a state's model standardises its features, or None."""
    kept = state["scale"]
    return None if kept is None else (kept["mean"].numpy(), kept["sd"].numpy())


def predict(
    model: MILModel,
    cases: Sequence[Case],
    task: Task,
    scale: Scale | None = None,
    max_tiles: int = 0,
    seed: int = 0,
) -> Iterator[Prediction]:
    """What `model` says of each case, in order, with every tile (or a random `max_tiles` of them), in eval mode."""
    keep_freed()
    device = next(_module(model).parameters()).device
    feed = Feed(cases, task, device, scale=scale, max_tiles=max_tiles)
    yield from _predictions(model, feed, (seed,) if max_tiles else None)


def evaluate(model: MILModel, feed: Feed, task: Task) -> dict[str, float]:
    """Loss in inference mode and the task's headline metric over all cases of `feed`; of several also theirs."""
    found = list(_predictions(model, feed, None))
    logits = torch.from_numpy(np.stack([p.logits for p in found]).astype(np.float64))
    values = [c.target for c in feed.cases if c.target is not None]
    target = task.target(values)
    loss = float(task.with_memory(None).loss(logits, target))
    return {"loss": loss, **task.headline_of(target.numpy(), logits)}


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


class _Epoch:
    """One pass over the training cases, in as many goes as the caller likes. memory: the Cox memory reached."""

    def __init__(
        self,
        model: MILModel,
        feed: Feed,
        task: Task,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        seed: int,
        epoch: int,
        memory: Tensor | None,
        within: State | None,
    ) -> None:
        self.memory = memory
        self._model, self._net, self._feed, self._task, self._config = model, _module(model), feed, task, config
        self._optimizer, self._epoch = optimizer, epoch
        self._device = next(self._net.parameters()).device
        self._lr = learning_rate(config, epoch)
        for group in optimizer.param_groups:
            group["lr"] = self._lr
        balanced = task if config.balance == "sampling" else None
        self._order = shuffled(feed.cases, config.batch_bags, balanced, seed, epoch)
        self._done = 0 if within is None else int(within["step"])
        # losses of the steps done, each a scalar on the device
        self._seen: dict[str, list[Tensor]] = {}
        if within is not None:
            self._seen = {k: list(v.to(self._device).unbind()) for k, v in within["losses"].items()}
        self._batches = feed.batches(self._order, (seed, epoch), self._done)
        optimizer.zero_grad(set_to_none=True)

    def run(self, due: Callable[[], bool]) -> bool:
        """Go on until `due` says that it is time for a checkpoint (True), or to the end (False)."""
        model, task, config, steps = self._model, self._task, self._config, len(self._order)
        self._net.train()
        for batch in self._batches:
            n = self._done
            assert batch.target is not None
            done = (self._epoch + n / steps) / config.epochs
            model.set_progress(done)
            model.packed = config.packed
            if config.attention_entropy:
                model.entropy_weight = cosine(config.attention_entropy, 0.0, done)
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=config.amp):
                reaching = task.with_memory(self.memory) if task.remembers else task
                named = model.losses(batch.bag, batch.target, reaching)
                total = functools.reduce(torch.add, [v.float() for v in named.values()])
            # the last steps of an epoch may be fewer than `accumulate`: each still weighs 1 / (steps added up)
            together = min(config.accumulate, steps - n // config.accumulate * config.accumulate)
            (total if together == 1 else total / together).backward()
            moving = (n + 1) % config.accumulate == 0 or n + 1 == steps
            if moving:
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
                model.after_step()
            if task.remembers:
                self.memory = _remember(model, batch.bag, batch.target, task, self.memory, config.cox_bags)
            for name, value in (*named.items(), ("loss", total)):
                self._seen.setdefault(name, []).append(value.detach())
            self._done = n + 1
            if moving and due():
                return True
        return False

    def within(self) -> State:
        """How far the epoch has come. Raises TrainingDiverged: a state that is lost already is not worth keeping."""
        return {"step": self._done, "losses": self._losses()}

    def means(self) -> dict[str, Any]:
        """The finished epoch's row of the history: mean of each loss. Raises TrainingDiverged."""
        return {"epoch": self._epoch, "lr": self._lr, **{k: float(v.mean()) for k, v in self._losses().items()}}

    def _losses(self) -> dict[str, Tensor]:
        """The losses of the steps done, float64 (steps,) each, on the CPU; all are finite.

        One look at them per epoch or checkpoint: a look per step would make a GPU wait for the host."""
        found: dict[str, Tensor] = {}
        for name, each in self._seen.items():
            values = torch.stack([v.double() for v in each]).cpu()
            if not torch.isfinite(values).all():
                step = int(torch.nonzero(~torch.isfinite(values))[0])
                who = ", ".join(self._feed.cases[i].patient for i in self._order[step])
                raise TrainingDiverged(
                    f"the loss {name!r} became {float(values[step])} in epoch {self._epoch + 1} at patient {who} "
                    f"(step {step + 1}); the last state before it is kept. "
                    "Lower train.lr, or standardise the features (train.standardize=true)"
                )
            found[name] = values
        return found


def _remember(model: MILModel, bag: Any, target: Tensor, task: Task, memory: Tensor | None, size: int) -> Tensor:
    """The memory with this step's bags added, as the task remembers their logits in inference mode; newest last."""
    net = _module(model)
    with torch.no_grad():
        net.eval()
        new = task.remembered(model(bag).logits, target)
        net.train()
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
                    case,
                    out.logits[b].float().cpu().numpy(),
                    out.scores[b][real].float().cpu().numpy(),
                    None if out.evidence is None else out.evidence[b][real].float().cpu().numpy(),
                )
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
