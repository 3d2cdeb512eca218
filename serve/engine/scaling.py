"""How many replicas an engine gets: Ray Serve's autoscaling, by requests that it does not see itself.

Requests go from the gateway to vLLM's own server. Each replica reports how many it has, and Ray Serve keeps to the
bounds and delays of the recipe.
"""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve.engine.replica import IN_FLIGHT


def by_requests_at_the_engines(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """The replicas wanted: all requests over those aimed at per replica."""
    reported = (context.aggregated_metrics or {}).get(IN_FLIGHT, {})
    if not reported:
        return context.target_num_replicas, {}
    config = context.config
    assert isinstance(config, AutoscalingConfig)
    return sum(reported.values()) / config.get_target_ongoing_requests(), {}
