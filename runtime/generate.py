"""Greedy generation: the prompt at once, then one token at a time with the cache.

Shapes: B sequences, S positions of the prompt, N new tokens.
"""

import torch
from torch import Tensor

from epplan.runtime.layer.head import Head

from .model import ExpertParallelModel


@torch.inference_mode()
def generate(model: ExpertParallelModel, head: Head, token_BS: Tensor, count: int) -> Tensor:
    """Return the likeliest continuation of every sequence, [B, N]; a collective.

    Args:
        model: this rank's.
        head: embedding and output head.
        token_BS: the prompts; ranks may have different ones of one length.
        count: N, the same on all ranks.
    """
    caches = model.new_caches(token_BS.shape[1] + count)
    new = []
    for _ in range(count):
        step = model.forward(head.embed(token_BS), caches=caches)
        token_BS = head.logits(step.hidden_BSH[:, -1:]).argmax(-1)
        new.append(token_BS)
    return torch.cat(new, dim=1)
