"""The transfer list: which expert a rank has to load before a new plan can run, and from where.

JSON, one transfer a line:

    {"schema_version": 1, "kind": "epplan-transfers", "plan": HASH, "from_plan": HASH,
     "expert_bytes": 1073741824, "total_bytes": ..., "transfers": [
      {"layer": 0, "expert": 5, "rank": 3, "host": "a", "gpu_index": 3, "from": "checkpoint"},
      {"layer": 2, "expert": 1, "rank": 0, "host": "a", "gpu_index": 0, "from": 7}]}

`layer` is the model's, ranks are the new plan's; `from` is the checkpoint or a rank that holds a
copy until the new plan runs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epplan.planner.plan import Plan

CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One expert of one layer that `rank` loads.

    Attributes:
        layer: absolute layer number.
        expert: the expert.
        rank: who loads it, in the new plan.
        source: a rank of the new plan that holds a copy; None: only the checkpoint has it.
    """

    layer: int
    expert: int
    rank: int
    source: int | None


def transfers_json(transfers: Sequence[Transfer], plan: Plan, before: Plan) -> dict[str, Any]:
    """Return the list as JSON values.

    Args:
        transfers: what is loaded.
        plan: the new plan.
        before: the plan it replaces.
    """
    size = plan.model.expert_bytes
    return {
        "schema_version": 1,
        "kind": "epplan-transfers",
        "plan": plan.sha256(),
        "from_plan": before.sha256(),
        "expert_bytes": size,
        "total_bytes": size * len(transfers),
        "transfers": [
            {
                "layer": transfer.layer,
                "expert": transfer.expert,
                "rank": transfer.rank,
                "host": plan.ranks[transfer.rank].host,
                "gpu_index": plan.ranks[transfer.rank].gpu_index,
                "from": CHECKPOINT if transfer.source is None else transfer.source,
            }
            for transfer in transfers
        ],
    }


def transfers_text(document: dict[str, Any]) -> str:
    """Return the file's text, one transfer a line."""
    head = {key: value for key, value in document.items() if key != "transfers"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document["transfers"])
    return "{\n" + ",\n".join([*lines, f'"transfers": [\n{rows}\n]']) + "\n}\n"
