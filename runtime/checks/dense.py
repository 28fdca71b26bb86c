"""The reference: the whole model in one process, without dispatch, one expert in memory at a time.

Shapes: B sequences of all ranks, S positions, T = B x S tokens, H hidden size, E experts, K experts
per token, L MoE layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from epplan.planner.model import ModelSpec
from epplan.runtime.layer.attention import attention, attention_step
from epplan.runtime.layer.experts import fingerprint, mlp, shared_mlp
from epplan.runtime.layer.norm import rms_norm
from epplan.runtime.layer.router import choose, preferences, router_logits, scores, weigh
from epplan.runtime.weights import Weights

from .routing_ties import choice_margin

# Scores closer than this part of their size may be ordered either way: a score moves by at most
# its logit's error times itself. Over 24 layers of top-8 routing of 128 experts the widest tie was
# 3e-6 in float32, 5e-3 in float16 and 4e-2 in bfloat16; with rows sent as 8-bit floats 4e-2.
_TIE_MARGIN = {
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    torch.float8_e4m3fn: 1e-1,
}
_MAX_DISAGREEMENTS = 16  # per layer: the run has failed by then, and each takes milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A token routed differently by the distributed run, beyond rounding."""

    layer: int  # absolute
    token: int  # among all ranks' tokens
    experts: tuple[int, ...]  # of the distributed run
    reference_experts: tuple[int, ...]
    margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseRun:
    """The reference's output, and how its routing compares."""

    hidden_BSH: Tensor
    fingerprints_LE: Tensor  # int64, of every expert's weights
    num_ties: int
    disagreements: tuple[Disagreement, ...]


def run_dense(
    spec: ModelSpec,
    weights: Weights,
    x_BSH: Tensor,
    experts_LTK: Tensor,
    rounding: torch.dtype,
) -> DenseRun:
    """Run all sequences of all ranks; differentiable.

    Args:
        spec: the model.
        weights: the same weights as the distributed run's.
        x_BSH: input hidden states.
        experts_LTK: the distributed run's choice, followed where it is a tie.
        rounding: the coarsest dtype of the distributed run.
    """
    num_ties = 0
    disagreements: list[Disagreement] = []
    fingerprints: list[Tensor] = []
    step = attention_step(spec, x_BSH)
    for layer in range(spec.num_layers):
        projections, gain_H = weights.attention(layer), weights.input_norm(layer)
        outputs = [  # sequence by sequence: what is inside a layer stays at one of them
            attention(
                rms_norm(x_1SH, gain_H, spec.norm_epsilon), projections, spec.attention, step, layer
            )
            for x_1SH in torch.split(x_BSH, 1)
        ]
        x_BSH = x_BSH + torch.cat(outputs)
        if layer in spec.moe_layers:
            experts_TK = experts_LTK[spec.moe_layers.index(layer)]
            out_BSH, ties, wrong, fingerprints_E = _run_moe(
                spec, weights, layer, x_BSH, experts_TK, rounding
            )
            x_BSH = x_BSH + out_BSH
            num_ties += ties
            disagreements += wrong
            fingerprints.append(fingerprints_E)
        else:
            dense, gain_H = weights.dense_mlp(layer), weights.post_attention_norm(layer)
            outputs = [
                mlp(rms_norm(x_1SH, gain_H, spec.norm_epsilon), dense)
                for x_1SH in torch.split(x_BSH, 1)
            ]
            x_BSH = x_BSH + torch.cat(outputs)
    return DenseRun(
        hidden_BSH=x_BSH,
        fingerprints_LE=torch.stack(fingerprints),
        num_ties=num_ties,
        disagreements=tuple(disagreements),
    )


def _run_moe(
    spec: ModelSpec,
    weights: Weights,
    layer: int,
    x_BSH: Tensor,
    experts_TK: Tensor,
    rounding: torch.dtype,
) -> tuple[Tensor, int, list[Disagreement], Tensor]:
    """Return the MoE output, ties, disagreements and the experts' fingerprints."""
    gain_H = weights.post_attention_norm(layer)
    h_TH = rms_norm(x_BSH, gain_H, spec.norm_epsilon).flatten(0, 1)
    logits_TE = router_logits(h_TH, weights.router(layer), weights.router_logit_bias(layer))
    scores_TE = scores(logits_TE, spec.router)
    preferences_TE = preferences(scores_TE, weights.router_bias(layer))
    own_TK = choose(preferences_TE, spec.router, spec.top_k)
    num_ties, wrong = _follow_ties(
        spec, layer, preferences_TE.detach(), own_TK, experts_TK.to(own_TK.device), rounding
    )
    weights_TK = weigh(scores_TE, own_TK, spec.router)
    sum_TH = torch.zeros_like(h_TH, dtype=torch.float32)
    fingerprints = []
    for number in range(spec.num_experts):
        expert = weights.expert(layer, number)
        fingerprints.append(fingerprint(expert))
        tokens, choices = (own_TK == number).nonzero(as_tuple=True)
        out_RH = mlp(h_TH[tokens], expert) * weights_TK[tokens, choices, None]
        sum_TH.index_add_(0, tokens, out_RH)
    out_TH = sum_TH.to(x_BSH.dtype)
    shared = weights.shared_expert(layer)
    if shared is not None:
        out_TH = out_TH + shared_mlp(h_TH, shared, weights.shared_gate(layer))
    return out_TH.view_as(x_BSH), num_ties, wrong, torch.stack(fingerprints)


def _follow_ties(
    spec: ModelSpec,
    layer: int,
    preferences_TE: Tensor,
    own_TK: Tensor,
    other_TK: Tensor,
    rounding: torch.dtype,
) -> tuple[int, list[Disagreement]]:
    """Overwrite own_TK by other_TK where the difference is a tie.

    Returns:
        The number of ties, and the first differences that are none.
    """
    differs_T = (own_TK.sort(-1).values != other_TK.sort(-1).values).any(-1)
    num_ties = 0
    wrong: list[Disagreement] = []
    for token in differs_T.nonzero().flatten().tolist():
        if len(wrong) == _MAX_DISAGREEMENTS:
            break
        other: list[int] = other_TK[token].tolist()
        margin = choice_margin(preferences_TE[token], other, spec.router)
        if margin <= _TIE_MARGIN[rounding]:
            num_ties += 1
            own_TK[token] = other_TK[token]
        else:
            wrong.append(
                Disagreement(
                    layer=layer,
                    token=token,
                    experts=tuple(sorted(other)),
                    reference_experts=tuple(sorted(own_TK[token].tolist())),
                    margin=margin,
                )
            )
    return num_ties, wrong
