"""One process or many: the collective operations of a run."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .memory import keep_freed_memory

PATIENCE = datetime.timedelta(minutes=30)  # of a collective operation, until a machine is taken to be gone


@dataclass(frozen=True)
class Distributed:
    """This process among those that `torchrun` started; a process on its own has rank 0 of 1.

    rank: number of this process.
    size: number of processes.
    device: that this process computes on.
    local_rank, local_size: the same as rank and size, among the processes on this machine.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and messages."""
        return self.rank == 0

    @property
    def quiet(self) -> bool:
        """Whether to show no progress bar: another process does, or standard error is no terminal."""
        return not self.is_first or not sys.stderr.isatty()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        total = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """The first process's value, on every process."""
        return self.gather(value)[0]


ALONE = Distributed(0, 1, torch.device("cpu"))


@contextlib.contextmanager
def distributed(device: str = "auto") -> Iterator[Distributed]:
    """Join the process group if `torchrun` started this process, and leave it at the end.

    The process keeps the memory of freed tensors, see `memory.keep_freed_memory`.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for a GPU where there is one.

    Raises:
        ValueError: there is no such device, or processes could not be started again.
    """
    keep_freed_memory()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and size > 1:
        device = f"cuda:{local_rank}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
    chosen = torch.device(device)
    if size == 1:
        yield Distributed(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # As of PyTorch 2.14 a process that is started again finds the addresses of ended ones in torchrun's own store.
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError("torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        yield Distributed(dist.get_rank(), dist.get_world_size(), chosen, local_rank, local_size)
    finally:
        dist.destroy_process_group()
