"""Collectives between the ranks of one host over inherited Unix sockets, for tensors in host memory.

Made by ``worker`` on a CPU, where torch's own backend would keep a TCP port open in every rank. ``workers`` makes one
socket pair for every two ranks. Sums are taken in the order of ranks, so every rank gets the same bits.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch


class SocketMesh:
    """This rank's end of a socket to every other; ``group`` lists the ranks of its tensor group, itself included."""

    def __init__(self, rank: int, sockets: Mapping[int, socket.socket], group: list[int]) -> None:
        self._rank = rank
        self._sockets = sockets
        self._group = group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the tensor group, in place."""
        parts = self._exchange(x)
        torch.add(parts[0], parts[1], out=x)
        for part in parts[2:]:
            x += part
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate ``x`` over the tensor group along its last dimension."""
        return torch.cat(self._exchange(x), dim=-1)

    def send(self, x: torch.Tensor, to: int) -> None:
        """Give a tensor to rank ``to``, which must know its shape."""
        self._sockets[to].sendall(_bytes_of(x.contiguous()))

    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        """Fill the contiguous ``out`` with what rank ``source`` sends."""
        sock, view = self._sockets[source], _bytes_of(out)
        while len(view):
            count = sock.recv_into(view)
            if count == 0:
                raise ConnectionError("another rank ended")
            view = view[count:]
        return out

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``x`` of every rank of the group, in their order. Of two ranks the lower one sends first: no deadlock."""
        own = x.contiguous().clone()
        parts = []
        for peer in self._group:
            if peer == self._rank:
                parts.append(own)
                continue
            if self._rank < peer:
                self.send(own, peer)
            theirs = self.receive(torch.empty_like(own), peer)
            if self._rank > peer:
                self.send(own, peer)
            parts.append(theirs)
        return parts


def _bytes_of(x: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    return x.view(-1).view(torch.uint8).numpy().data
