"""Models of `transformers` as this project's models are called."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Logits(nn.Module):
    """A causal model of transformers as ids (B,T) -> logits (B,T,V) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def stack(self, x: Tensor) -> Tensor:
        """The layers' output of embeddings x (B,T,D); transformers' base models end with their norm."""
        out: Tensor = self.base(inputs_embeds=x, use_cache=False).last_hidden_state
        return out

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.base_model
