"""What the stages share: the set-up, one optimiser step, checkpoints, resuming.

Accelerate does devices, distribution (DDP, FSDP2, DeepSpeed by its own config), mixed precision and
the state on disk. Nothing here knows which stage it serves.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf import config as config_file
from fastrlhf.config import require
from fastrlhf.errors import NonFiniteLoss, UserError
from fastrlhf.runlog import RunLog, writable_dir

# It warns of tied embeddings at each checkpoint, which are saved once and loaded rightly.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)

KEEP_CHECKPOINTS = 2  # the last one may be the one that a full disk cut short


@dataclass(slots=True, kw_only=True)
class OptimizerConfig:
    """Adam and its schedule. The paper: betas (0.9, 0.95); decay to a tenth by a cosine."""

    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon (PPO of lm-human-preferences: 1e-5)."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    final_fraction: float = 0.1
    """What the cosine ends at, as a share of the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_from: float = 0.0
    """Share of the peak that the first step takes; 0: 1 / warmup_steps."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        require(self.eps > 0, "eps", f"must be positive, got {self.eps}")
        require(all(0 <= b < 1 for b in self.betas), "betas", f"lie in [0, 1), got {self.betas}")
        require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        require(self.max_grad_norm >= 0, "max_grad_norm", "must not be negative")

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of optimiser step ``step`` (0-based) out of ``total``."""
        if step < self.warmup_steps:
            first = max(self.warmup_from, 1.0 / self.warmup_steps)
            return self.lr * (first + (1.0 - first) * step / max(1, self.warmup_steps - 1))
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.final_fraction + (1.0 - self.final_fraction) * cosine)


@dataclass(slots=True, kw_only=True)
class StageConfig:
    """What every training stage takes."""

    out: Path
    """Folder of the run: config.toml, metrics.jsonl, tensorboard/, checkpoints/, model/."""
    data: Path | None = None
    """Folder that relative data files are looked up in."""
    seed: int = 0
    """Seed of weights, order, dropout and sampling."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 products or not; auto: bf16 on a GPU and on a CPU with AMX, else fp32."""
    max_tokens: int = 8192
    """Padded tokens of a micro-batch; gradients do not depend on it but for rounding."""
    save_every: int = 100
    """Optimiser steps (PPO: iterations) between checkpoints; 0: only at the end."""
    resume: bool = False
    """Go on from the last checkpoint in ``out``; a finished run is left as it is."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: bool = False
    """Report to Weights & Biases too (needs wandb)."""
    deterministic: bool = True
    """On a GPU, only algorithms that repeat their bits; what has none raises a RuntimeError."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", f"must lie in [0, 2**31), got {self.seed}")
        require(self.max_tokens > 0, "max_tokens", f"must be positive, got {self.max_tokens}")
        require(self.save_every >= 0, "save_every", "must not be negative")


@dataclass(slots=True)
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"step": self.step, "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.step, self.extra = state["step"], state["extra"]


class Session:
    """One run of one stage: device, log, checkpoints.

    Use: make it, build models and optimisers, ``prepare`` them, ``restore()``, train,
    ``save_model()``, ``close()``.

    On a GPU torch repeats its bits from the start of a session to its end, for the whole process
    (see ``repeatable``), unless the config's ``deterministic`` is off.
    """

    def __init__(self, config: StageConfig, stage: str) -> None:
        self.stage, self.config = stage, config
        self.out = writable_dir(config.out)
        self.checkpoints = self.out / "checkpoints"
        self.accelerator = Accelerator(
            mixed_precision=_mixed_precision(config.precision),
            # Without this word it leaves several processes on CPUs unconnected, each the main one.
            cpu=not torch.accelerator.is_available(),
        )
        self.device = self.accelerator.device
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        existing = saved_checkpoints(self.checkpoints)
        if (existing or (self.out / "model").exists()) and not config.resume:
            raise UserError(
                f"{self.out}: holds a run already; add --resume to go on, or name another folder"
            )
        self.resumed_from = existing[-1] if config.resume and existing else None
        # The rank shifts the seed of dropout, not of the weights: DDP broadcasts those.
        set_seed(config.seed, device_specific=self.accelerator.num_processes > 1)
        self.log: RunLog | None = None
        self._modes = ExitStack()
        if config.deterministic:
            self._modes.enter_context(repeatable(self.device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    @property
    def finished(self) -> bool:
        """Whether an earlier run in this folder came to its end."""
        return self.config.resume and (self.out / "model" / "config.json").is_file()

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        """Models and optimisers on their device, wrapped for distribution."""
        prepared = self.accelerator.prepare(*objects)
        return prepared if isinstance(prepared, tuple) else (prepared,)

    def register(self, *objects: Any) -> None:
        """More objects with state_dict and load_state_dict, to be saved with every checkpoint."""
        self.accelerator.register_for_checkpointing(*objects)

    def restore(self) -> int:
        """Load the last checkpoint when resuming; return the step to go on from.

        Called when all input has been read and found good: it opens the log and saves the config,
        so that bad input leaves an earlier run's files as they were.
        """
        if self.resumed_from is not None:
            self.accelerator.load_state(str(self.resumed_from))
        if self.accelerator.is_main_process:
            config_file.save(self.config, self.out / "config.toml")
            self.log = RunLog(
                self.out,
                resume_step=self.progress.step if self.resumed_from is not None else None,
                tensorboard=self.config.tensorboard,
                wandb=self.config.wandb,
            )
        return self.progress.step

    def spend(self, model: nn.Module, tokens: int, *, backward: bool) -> None:
        """Count the work of tokens through a model: 2 flop a weight and token, 6 with backward.

        Attention's own products are left out, as in Kaplan et al. (2020). All processes count
        alike.
        """
        work = (6 if backward else 2) * matmul_parameters(model) * tokens
        self.progress.extra["flop"] = self.progress.extra.get("flop", 0) + work

    def record(self, step: int, **metrics: float) -> None:
        """Log metrics of a step (main process only)."""
        if self.log is not None:
            self.log.log(step, **metrics, flop=float(self.progress.extra.get("flop", 0)))

    def step(
        self,
        number: int,
        model: nn.Module,
        optimizer: Any,
        lr: float,
        max_grad_norm: float,
        loss: float,
    ) -> float:
        """One optimiser step on the accumulated gradients; returns their norm before clipping.

        Raises NonFiniteLoss naming step ``number`` (from 1; PPO: the iteration), leaving weights
        untouched, when the loss or the norm is not finite.
        """
        limit = max_grad_norm if max_grad_norm > 0 else math.inf
        norm = float(self.accelerator.clip_grad_norm_(model.parameters(), limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = saved_checkpoints(self.checkpoints)
            raise NonFiniteLoss(
                f"{self.stage}: step {number}: loss {loss}, gradient norm {norm}; "
                f"last good checkpoint: {kept[-1] if kept else 'none yet'}"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, step: int) -> None:
        """Write a checkpoint of everything that the next step depends on; drop the oldest."""
        self.progress.step = step
        target = self.checkpoints / f"step-{step:07d}"
        self.accelerator.wait_for_everyone()
        staging = target.with_suffix(".partial")
        if self.accelerator.is_main_process and staging.exists():
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staging))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if target.exists():
                shutil.rmtree(target)
            os.replace(staging, target)
            for old in saved_checkpoints(self.checkpoints)[:-KEEP_CHECKPOINTS]:
                shutil.rmtree(old)

    def due(self, step: int, total: int) -> bool:
        """Whether a checkpoint is to be written after ``step`` steps out of ``total``."""
        every = self.config.save_every
        return step == total or (every > 0 and step % every == 0)

    def save_model(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str = "model"
    ) -> Path:
        """Write a model as a Hugging Face directory of this run; returns its path."""
        self.accelerator.wait_for_everyone()
        path = self.out / name
        if self.is_main:
            self.unwrap(model).save(path, tokenizer)
        self.accelerator.wait_for_everyone()
        return path

    def unwrap(self, model: nn.Module) -> Any:
        """The model without its distribution wrapper."""
        return self.accelerator.unwrap_model(model)

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's part of a global batch (every n-th item).

        A process without items would leave the others waiting for its gradients.
        """
        if 0 < len(items) < self.accelerator.num_processes:
            raise UserError(
                f"a batch of {len(items)} cannot be shared by {self.accelerator.num_processes} "
                "processes; take larger batches or fewer processes"
            )
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def total(self, value: float) -> float:
        """Sum of a number over processes."""
        if self.accelerator.num_processes == 1:
            return value
        summed = self.accelerator.reduce(
            torch.tensor(value, device=self.device, dtype=torch.float64)
        )
        return float(summed)

    def local_normalizer(self, total: float) -> float:
        """What a local sum is divided by, so that DDP's mean of gradients is the global mean."""
        return max(total, 1.0) / self.accelerator.num_processes

    def close(self) -> None:
        """Close the log, free what Accelerate holds, and leave torch as it was."""
        self._modes.close()
        if self.log is not None:
            self.log.close()
        self.accelerator.free_memory()
        # Accelerate keeps one precision a process; the next stage may want another.
        AcceleratorState._reset_state()


@contextmanager
def session(config: StageConfig, stage: str) -> Iterator[Session]:
    """A Session that is closed whatever happens."""
    opened = Session(config, stage)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Torch's kernels on a GPU give the same bits run after run, in the whole process.

    Left to themselves some add as their threads arrive: the backward passes of attention and of
    gather. Not merely warned of: with ``warn_only`` attention would stay as it is. New memory is
    left unfilled, since no result here depends on it. What it costs on a GPU is not yet measured.
    On a CPU the trainer's operations repeat as they are, and nothing is changed.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # whose attributes are made at run time
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # "fused" updates all tensors in one pass, on the CPU as well.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def accumulate(session: Session, model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> float:
    """Backward of each loss in turn, gradients reduced once; returns their sum.

    Each entry computes one micro-batch's loss, already divided by the global normalizer. A rank
    without micro-batches would hang the others, so callers give every rank at least one.
    """
    total = 0.0
    for index, compute in enumerate(losses):
        if index < len(losses) - 1:
            with session.accelerator.no_sync(model):
                total += _backward(session, compute)
        else:
            total += _backward(session, compute)
    return session.total(total) / session.accelerator.num_processes


def _backward(session: Session, compute: Callable[[], Tensor]) -> float:
    with session.accelerator.autocast():
        loss = compute()
    session.accelerator.backward(loss)
    return float(loss.detach())


def matmul_parameters(model: nn.Module) -> int:
    """Weights that every token is multiplied by: all matrices but the input embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return sum(
        p.numel()
        for p in model.parameters()
        if p.ndim >= 2 and (id(p) not in embeddings or id(p) in heads)
    )


def saved_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a run's folder, oldest first; interrupted ones do not count."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".partial")


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that takes ``path``'s name when the block ends well."""
    writable_dir(path.parent)
    staging = path.with_name(path.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    yield staging
    if path.exists():
        shutil.rmtree(path)
    os.replace(staging, path)


def _mixed_precision(precision: str) -> str:
    """Accelerate's word for a precision; auto asks the machine."""
    if precision == "fp32":
        return "no"
    if precision == "bf16" or torch.cuda.is_available():
        return "bf16"
    # bf16 products win on a CPU only where it multiplies them in hardware tiles (AMX).
    return "bf16" if torch.cpu._is_amx_tile_supported() else "no"
