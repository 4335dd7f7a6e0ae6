"""How a method's learning rate falls over its budget."""

from collections.abc import Mapping
from typing import Any

from rwkv_es.es.schedule import decay

_PARTS = 1000  # that a budget is cut into


def falling(settings: Mapping[str, Any], spent: float) -> float:
    """Return what the rate is multiplied by after a share of the budget; settings: `schedule`, and its `end`, 0."""
    return decay(settings.get("schedule", "constant"), round(_PARTS * spent), _PARTS + 1, settings.get("end", 0.0))
