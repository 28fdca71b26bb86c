"""How logits become experts and weights: one rule for all model families.

Shapes: T tokens, H hidden size, E experts, K experts per token (top-k), N groups of E / N experts.

Logits are in logical expert order and float32. Placement never enters here: slots are looked up
afterwards, because permuting the router's rows would break ties differently and would tear
apart the groups of group-limited routing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from epplan.planner.model import RouterSpec

from .own_kernels import can_run_short_step_kernels

_MOST_EXPERTS = 64  # whose logits a program holds; with more, torch's product is a large one
_SHORT_STEP = 256  # tokens; each reads the router's weights by itself


def route(
    logits_TE: Tensor, spec: RouterSpec, top_k: int, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weight and the number of each chosen expert.

    Args:
        logits_TE: router logits.
        spec: the model's rule.
        top_k: experts per token.
        bias_E: correction bias; it changes the choice, never the weight.

    Returns:
        weights_TK (float32) and experts_TK (int64), best choice first.
    """
    scores_TE = scores(logits_TE, spec)
    experts_TK = choose(preferences(scores_TE, bias_E), spec, top_k)
    return weigh(scores_TE, experts_TK, spec), experts_TK


def route_tokens(
    h_TH: Tensor,
    router_EH: Tensor,
    logit_bias_E: Tensor | None,
    spec: RouterSpec,
    top_k: int,
    bias_E: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what `route` makes of the hidden states' logits."""
    plain = spec == RouterSpec(renormalize=False) and logit_bias_E is None and bias_E is None
    if plain and top_k == 1 and len(h_TH) <= _SHORT_STEP and can_run_short_step_kernels(h_TH):
        from epplan.runtime.kernels.decode_rows import route_best

        return route_best(h_TH, router_EH)
    return route(router_logits(h_TH, router_EH, logit_bias_E), spec, top_k, bias_E)


def router_logits(h_TH: Tensor, router_EH: Tensor, bias_E: Tensor | None) -> Tensor:
    """Return logits_TE of hidden states, float32."""
    if bias_E is None and len(router_EH) <= _MOST_EXPERTS and can_run_short_step_kernels(h_TH):
        from epplan.runtime.kernels.router_logits import router_logits as router_logits_kernel

        return router_logits_kernel(h_TH, router_EH)
    return F.linear(h_TH.float(), router_EH, bias_E)


def scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Return scores_TE in [0, 1], float32."""
    logits_TE = logits_TE.float()
    return logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()


def preferences(scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """Return what the choice goes by: the scores, corrected by the bias where there is one."""
    return scores_TE if bias_E is None else scores_TE + bias_E


def choose(preferences_TE: Tensor, spec: RouterSpec, top_k: int) -> Tensor:
    """Return experts_TK: the best ones within the best groups."""
    if spec.groups > 1:
        preferences_TE = _within_best_groups(preferences_TE, spec)
    return preferences_TE.topk(top_k, dim=-1).indices


def weigh(scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Return weights_TK of the chosen experts."""
    weights_TK = scores_TE.gather(1, experts_TK)
    if spec.renormalize:
        # 1e-20 as in the published models: sigmoid scores may all underflow to 0.
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * spec.scale


def _within_best_groups(preferences_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Return the preferences with -inf for every expert outside its token's best groups."""
    grouped_TNe = torch.unflatten(preferences_TE, -1, (spec.groups, -1))
    if spec.group_rule == "max":
        groups_TN = grouped_TNe.amax(-1)
    else:
        groups_TN = grouped_TNe.topk(min(2, grouped_TNe.shape[-1]), dim=-1).values.sum(-1)
    best_TG = groups_TN.topk(spec.topk_groups, dim=-1).indices
    outside_TN = torch.ones_like(groups_TN, dtype=torch.bool).scatter_(1, best_TG, False)
    return grouped_TNe.masked_fill(outside_TN[..., None], float("-inf")).flatten(1)
