"""One step's tensors, complete at construction: what a model's forward pass reads.

Legend: T tokens of the step, S sequences of the step, G block-table groups, B blocks of a table.
Sequences come decodes (one query token) first, then prefills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The ragged shape of a step, as paged attention reads it.

    ``query_start`` int32 ``[S + 1]``: first query row of each sequence. ``seq_lens`` int32 ``[S]``: context
    length including this step's tokens (0 for graph padding). ``block_tables`` int32 ``[G, S, B]``.
    ``slots`` int64 ``[G, T]``: ``block_id * block_size + offset`` where each token's k/v go.
    The first ``num_decodes`` sequences have exactly one query token. The ``max_*`` are host ints.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Images whose patches fall into this step: feature rows overwrite embedding rows."""

    features: torch.Tensor  # [R, hidden] projected features
    token_idx: torch.Tensor  # [R] int64 rows of the step


@dataclass(frozen=True, slots=True)
class Batch:
    """``token_ids`` and ``positions`` int64 ``[T]``; ``images`` where image features replace embeddings.

    ``output_rows`` int64 ``[N]``: the tokens whose hidden states are wanted; None for all.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    images: ImageBatch | None = None
    output_rows: torch.Tensor | None = None
