"""Around the layers: tokens to hidden states, hidden states to logits.

Shapes: B sequences, S positions, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from epplan.runtime.weights import Weights

from .norm import rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Embedding, final norm and output head, held by every rank."""

    embedding_VH: Tensor
    norm_H: Tensor | None
    output_VH: Tensor
    epsilon: float

    def embed(self, token_BS: Tensor) -> Tensor:
        """Return the hidden states of tokens, [B, S, H]."""
        return F.embedding(token_BS, self.embedding_VH)

    def logits(self, x_BSH: Tensor) -> Tensor:
        """Return the logits of the next token, [B, S, V], in the model's dtype."""
        return F.linear(rms_norm(x_BSH, self.norm_H, self.epsilon), self.output_VH)


def build_head(weights: Weights) -> Head:
    """Return the head; a tied output head shares the embedding's memory."""
    embedding_VH = weights.embedding()
    tied = weights.spec.tied_embeddings
    return Head(
        embedding_VH=embedding_VH,
        norm_H=weights.final_norm(),
        output_VH=embedding_VH if tied else weights.output_head(),
        epsilon=weights.spec.norm_epsilon,
    )
