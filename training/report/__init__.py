"""`mohge report`: one page about a training run or a model, and the measurements it is made of."""

from .measure import RoutingEvaluation, evaluate_routing, format_router_table


__all__ = ["RoutingEvaluation", "evaluate_routing", "format_router_table"]
