"""The place of a process among its peers, passed as an object to every layer that needs it.

Built once per worker process and handed down; nothing here is global. On one rank every
collective is the identity, so a layer is written once for any number of GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from outrider.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class Mesh(Protocol):
    """Collectives of host tensors, see ``runner.mesh``."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the tensor group, in place."""

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate over the tensor group along the last dimension."""

    def send(self, x: torch.Tensor, to: int) -> None:
        """Give a tensor to a rank."""

    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        """Fill ``out`` with what a rank sends."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """Tensor- and pipeline-parallel rank of this process, with the groups to talk over.

    ``expert_parallel`` splits MoE layers by expert instead of by column inside the tensor group. ``mesh`` carries
    host tensors; without one, ``torch.distributed`` carries everything.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    expert_parallel: bool = False
    tp_group: ProcessGroup | None = None
    mesh: Mesh | None = None

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.pp_rank == self.pp_size - 1

    def layer_range(self, num_layers: int) -> range:
        """The layers of this pipeline stage; the first stages take the remainder."""
        if self.pp_size > num_layers:
            raise ConfigError(
                f"--pipeline-parallel-size {self.pp_size} is more than the model's {num_layers} layers; lower it."
            )
        base, extra = divmod(num_layers, self.pp_size)
        start = self.pp_rank * base + min(self.pp_rank, extra)
        return range(start, start + base + (self.pp_rank < extra))

    def shard(self, size: int, what: str) -> tuple[int, int]:
        """``(start, length)`` of this rank's part of a dimension of ``size``; it must divide evenly."""
        if size % self.tp_size:
            raise ConfigError(
                f"{what} ({size}) cannot be split over --tensor-parallel-size {self.tp_size}; choose a divisor of it."
            )
        length = size // self.tp_size
        return self.tp_rank * length, length

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the tensor group, in place."""
        if self.tp_size > 1 and self.mesh is not None:
            return self.mesh.all_reduce(x)
        if self.tp_size > 1:
            import torch.distributed as dist

            dist.all_reduce(x, group=self.tp_group)
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate ``x`` over the tensor group along its last dimension."""
        if self.tp_size == 1:
            return x
        if self.mesh is not None:
            return self.mesh.all_gather_last(x)
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        dist.all_gather(parts, x.contiguous(), group=self.tp_group)
        return torch.cat(parts, dim=-1)

    def send_next(self, hidden: torch.Tensor) -> None:
        """Hand hidden states ``[T, M]`` to the same tensor rank of the next pipeline stage."""
        to = (self.pp_rank + 1) * self.tp_size + self.tp_rank
        if self.mesh is not None:
            self.mesh.send(hidden, to)
            return
        import torch.distributed as dist

        dist.send(hidden.contiguous(), dst=to)

    def receive_previous(self, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the hidden states of the previous pipeline stage."""
        source = (self.pp_rank - 1) * self.tp_size + self.tp_rank
        if self.mesh is not None:
            return self.mesh.receive(out, source)
        import torch.distributed as dist

        dist.recv(out, src=source)
        return out
