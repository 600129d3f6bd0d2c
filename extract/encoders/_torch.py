"""A torch model as an encoder: tiles to the device, resize, normalise, forward, back; with retreat on out-of-memory.

In: a module, a pooling function, an input recipe and the settings. Out: the `encode` and `launch` of `Encoder`.
Knows no model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mhim.configs.schema import ExtractConfig
from mhim.extract import memory
from mhim.extract.encoders._contract import GpuFailed, NoGpu, resolved_precision

CPU_BATCH = 8  # larger batches spend half their time on page faults of activations (25 MB each at 8 for a ResNet-50)
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GPU_WORDS = ("CUDA error", "CUDA driver", "CUDA unknown error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS", "NVML")


@dataclass(frozen=True)
class Recipe:
    """From a tile to the model's input: resize to `resize_px`, cut the central `input_px`, (x / 255 - mean) / std."""

    input_px: int
    resize_px: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __str__(self) -> str:
        crop = f", centre crop {self.input_px}" if self.resize_px != self.input_px else ""
        mean, std = (" ".join(f"{v:g}" for v in t) for t in (self.mean, self.std))
        return f"resize {self.resize_px} {self.interpolation} antialias, rounded to uint8{crop}; mean {mean}; std {std}"


def device_of(config: ExtractConfig) -> torch.device:
    """The device the settings ask for. Raises NoGpu: work is never moved to a CPU in silence."""
    if not (config.gpu or config.gpus):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NoGpu("--gpu: this machine shows no usable GPU to torch; leave --gpu out to run on the CPU")
    number = config.gpus[0] if len(config.gpus) == 1 else 0
    if number >= torch.cuda.device_count():
        raise NoGpu(f"--gpus {number}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", number)


def cast_once(module: torch.nn.Module, kind: torch.dtype) -> None:
    """Give the linear and convolutional layers of timm's modules weights of `kind`: the same numbers as autocast makes
    of them anew in every forward pass, which doubles the number of kernels that a small model launches. (Code from
    elsewhere may switch autocast off for a part, and then needs its weights as they are.)"""
    for owner in module.modules():
        if type(owner).__module__.startswith("timm."):
            for layer in owner.children():
                if type(layer) in (torch.nn.Linear, torch.nn.Conv2d):
                    layer.to(kind)


class Runner:
    """Runs `forward` (normalised float (B, 3, H, W) -> (B, dim)) over uint8 tiles.

    On a CPU every forward pass has exactly CPU_BATCH rows (the last one padded), so that a tile's vector does not
    depend on where a chunk or a resumed run begins. On a GPU `config.batch` rows, halved when memory runs out.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        forward: Callable[[Any, torch.Tensor], torch.Tensor],
        dim: int,
        recipe: Recipe,
        precision: str,
        config: ExtractConfig,
    ) -> None:
        self.device = device_of(config)
        self.cuda = self.device.type == "cuda"
        if not self.cuda:
            memory.keep_freed()
        self.dim = dim
        self.recipe = recipe
        self.precision = resolved_precision(config, precision)
        self.batch = config.batch if self.cuda else CPU_BATCH
        self.halvings = 0
        module = module.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward = forward
        if self.precision != "float32":
            cast_once(module, _TYPES[self.precision])
        self.module: Any = torch.compile(module) if config.compile else module
        # the next tiles reach a GPU while it computes on these: copies have a stream of their own
        self._copies = torch.cuda.Stream(self.device) if self.cuda else None
        self.mean = (torch.tensor(recipe.mean, device=self.device) * 255).view(1, 3, 1, 1)
        self.scale = (1 / (torch.tensor(recipe.std, device=self.device) * 255)).view(1, 3, 1, 1)

    def prepare(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) on the device -> normalised float32 (B, 3, input_px, input_px), channels last."""
        x = tiles.permute(0, 3, 1, 2)  # (B, 3, H, W): channels last in memory, as it came
        recipe = self.recipe
        if x.shape[-1] != recipe.resize_px or x.shape[-2] != recipe.resize_px:
            size = (recipe.resize_px, recipe.resize_px)
            if not self.cuda:  # torch resizes uint8 directly on a CPU only
                x = F.interpolate(x, size, mode=recipe.interpolation, antialias=True)
            else:  # there, as in Pillow, columns come first and are rounded before the rows: at once, a tenth of all
                for step in ((x.shape[-2], size[1]), size):  # pixels of a bicubic 256 -> 224 would differ, by up to 3
                    x = F.interpolate(x.float(), step, mode=recipe.interpolation, antialias=True)
                    x = x.round_().clamp_(0, 255)
        if recipe.resize_px != recipe.input_px:
            edge = (recipe.resize_px - recipe.input_px) // 2
            x = x[..., edge : edge + recipe.input_px, edge : edge + recipe.input_px]
        return ((x.float() - self.mean) * self.scale).contiguous(memory_format=torch.channels_last)

    def _forward(self, tiles: torch.Tensor) -> torch.Tensor:
        x = self.prepare(self._arrived(tiles))
        if self.precision == "float32":
            out = self.forward(self.module, x)
        else:
            with torch.autocast(self.device.type, dtype=_TYPES[self.precision]):
                out = self.forward(self.module, x)
        if out.ndim != 2 or out.shape[1] != self.dim:
            raise RuntimeError(f"the model gives {tuple(out.shape)} where (tiles, {self.dim}) is declared")
        return out.float()

    def _arrived(self, tiles: torch.Tensor) -> torch.Tensor:
        """The tiles on the device; the stream in use waits for them there, the host does not."""
        if self._copies is None:
            return tiles
        with torch.cuda.stream(self._copies):
            there = tiles.to(self.device, non_blocking=True)
        using = torch.cuda.current_stream(self.device)
        using.wait_stream(self._copies)
        there.record_stream(using)  # its memory is not given away before this stream is done with it
        return there

    def launch(self, tiles: np.ndarray) -> Callable[[], np.ndarray]:
        """Start on uint8 (B, H, W, 3); the returned function waits and gives float32 (B, dim).

        On a GPU the work is queued and the host goes on; `tiles` must stay unchanged until the wait is over.
        """
        source = torch.from_numpy(tiles)
        if not self.cuda:
            return lambda: self._on_cpu(source)
        with torch.inference_mode():
            out = torch.empty((len(tiles), self.dim), dtype=torch.float32, pin_memory=True)
            with self._watched():
                for row, part in self._parts(source):
                    out[row : row + len(part)].copy_(part, non_blocking=True)
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(self.device))

        def wait() -> np.ndarray:
            with self._watched():
                done.synchronize()
            return out.numpy()

        return wait

    def _parts(self, source: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, features) of batch after batch; the batch is halved, and stays so, where memory runs out."""
        row = 0
        while row < len(source):
            try:
                part = self._forward(source[row : row + self.batch])
            except torch.cuda.OutOfMemoryError:
                self._halve()
                continue
            yield row, part
            row += len(part)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Within it, an error of the device becomes GpuFailed; one of the model stays what it is."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if isinstance(error, torch.AcceleratorError) or any(word in text for word in _GPU_WORDS):
                first = (text.strip().splitlines() or [type(error).__name__])[0]
                raise GpuFailed(f"{self.device} failed ({first}): look at `nvidia-smi` and the system's log") from error
            raise

    def _on_cpu(self, source: torch.Tensor) -> np.ndarray:
        out = np.empty((len(source), self.dim), np.float32)
        with torch.inference_mode():
            for row in range(0, len(source), CPU_BATCH):
                part = source[row : row + CPU_BATCH]
                rows = len(part)
                if rows < CPU_BATCH:
                    part = torch.cat([part, part[-1:].expand(CPU_BATCH - rows, *part.shape[1:])])
                out[row : row + rows] = self._forward(part)[:rows].numpy()
        return out

    def _halve(self) -> None:
        if self.batch == 1:
            raise NoGpu("the GPU has no memory for even one tile; free it, or run this encoder elsewhere")
        self.batch = max(1, self.batch // 2)
        self.halvings += 1
        torch.cuda.empty_cache()

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> float32 (B, dim)."""
        return self.launch(np.ascontiguousarray(tiles))()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 buffer that the device reads quickly (pinned on a GPU)."""
        if self.cuda:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(shape, np.uint8)
