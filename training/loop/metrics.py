"""What a router does: load, balance and activated parameters, from counts of tokens per expert."""

from collections.abc import Sequence

import torch

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.info import Routing, chosen_parameters


def dense_parameters(model: MoHGEForCausalLM) -> int:
    """Number of parameters that every token passes through: all but the routed experts and adapters on them."""
    routed = sum(p.numel() for found in model.sparse_feed_forwards for p in found.experts.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - routed


class RouterStatistics:
    """
    Counts of tokens per expert, added up over forward passes, and the figures that follow from them.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        dense_parameters (`int`):
            Parameters that every token passes through: all but those of the routed experts.

    ```python
    >>> statistics = RouterStatistics(model.config, dense_parameters(model))
    >>> outputs = model(**inputs, output_router_logits=True)
    >>> statistics.add(outputs.tokens_per_expert, tokens=inputs["attention_mask"].sum())
    >>> statistics.summary()["max_vio"]
    ```
    """

    def __init__(self, config: MoHGEConfig, dense_parameters: int):
        self.layers = config.sparse_layers
        if not self.layers:
            raise ValueError("`mlp_only_layers` leaves no layer with experts: there is no routing to report")
        self.num_groups = max(layer.num_groups for layer in self.layers)
        self.dense_parameters = dense_parameters
        self.counts: list[torch.Tensor] = [torch.zeros(layer.num_experts) for layer in self.layers]
        self.tokens = torch.zeros(())

    def add(self, tokens_per_expert: Sequence[torch.Tensor], tokens: torch.Tensor | int):
        """Add a forward pass: the model output's `tokens_per_expert`, and its number of tokens without padding.
        Nothing waits for the device."""
        self.counts = [total.to(new.device) + new for total, new in zip(self.counts, tokens_per_expert, strict=True)]
        self.tokens = self.tokens.to(self.counts[0].device) + tokens

    def tensors(self) -> list[torch.Tensor]:
        """The sums, to be added up over ranks and given back to `set_tensors`."""
        return [self.tokens, *self.counts]

    def set_tensors(self, tensors: list[torch.Tensor]):
        """Replace the sums."""
        self.tokens, *self.counts = tensors

    def choices_per_group(self) -> torch.Tensor:
        """[L, G]: how often each layer's tokens chose an expert of each group; 0 where a layer has fewer groups."""
        choices = self.tokens.new_zeros(len(self.layers), self.num_groups)
        for row, layer, count in zip(choices, self.layers, self.counts, strict=True):
            row.index_add_(0, torch.tensor(layer.expert_groups, device=count.device), count)
        return choices

    def group_share(self) -> torch.Tensor:
        """[L, G]: share of each group in a layer's choices."""
        choices = self.choices_per_group()
        return choices / choices.sum(1, keepdim=True).clamp(min=1)

    def activated_parameters(self) -> float:
        """Mean number of parameters a token passes through, embeddings included."""
        counts = torch.cat(self.counts).split([layer.num_experts for layer in self.layers])
        chosen = chosen_parameters(self.layers, [count.tolist() for count in counts])
        return self.dense_parameters + chosen / max(float(self.tokens), 1)

    def routing(self, text: str) -> Routing:
        """What has been counted, as a record of the tokens of `text`."""
        return Routing(text, int(self.tokens), [count.long().tolist() for count in self.counts])

    def summary(self) -> dict[str, float]:
        """
        The figures as numbers, averaged over layers: `activated_parameters` per token; `tokens_group_{g}`, how often
        a token chose group g, in choices per layer; `group_entropy` of these choices, in nats; `load_variation`
        (standard deviation over mean of the tokens per expert), `max_vio` (most loaded expert over the mean, minus 1)
        and `dead_experts` (experts without a token, over all layers).
        """
        loads = [count / count.mean().clamp(min=torch.finfo(count.dtype).tiny) for count in self.counts]
        share = self.group_share()
        return {
            "activated_parameters": self.activated_parameters(),
            **{f"tokens_group_{g}": float(value) for g, value in enumerate(self.choices_per_group().mean(0))},
            "group_entropy": float(torch.special.entr(share).sum(1).mean()),
            "load_variation": float(torch.stack([load.std(correction=0) for load in loads]).mean()),
            "max_vio": float(torch.stack([load.max() - 1 for load in loads]).mean()),
            "dead_experts": float(sum((count == 0).sum() for count in self.counts)),
        }

    def table(self) -> list[dict]:
        """The router table: for each group its `widths` and `experts` (each distinct value over the layers), `choices`
        over all layers, its `share` of the choices, `even_share` if all experts were equally loaded, and `max_vio` and
        `dead_experts` inside the group."""
        whole = sum(float(count.sum()) for count in self.counts)
        rows = []
        for group in range(self.num_groups):
            layers = [i for i, layer in enumerate(self.layers) if group < layer.num_groups]
            loads = [
                self.counts[i][torch.tensor(self.layers[i].expert_groups, device=self.counts[i].device) == group]
                for i in layers
            ]
            used = [load for load in loads if load.sum() > 0]
            choices = sum(float(load.sum()) for load in loads)
            rows.append(
                {
                    "group": group,
                    "widths": sorted({self.layers[i].moe_intermediate_sizes[group] for i in layers}),
                    "experts": sorted({self.layers[i].expert_counts[group] for i in layers}),
                    "choices": int(choices),
                    "share": choices / max(whole, 1),
                    "even_share": sum(map(len, loads)) / sum(map(len, self.counts)),
                    "max_vio": sum(float(load.max() / load.mean()) - 1 for load in used) / max(len(used), 1),
                    "dead_experts": sum(int((load == 0).sum()) for load in loads),
                }
            )
        return rows
