"""The layers of a causal language model, each around transformers' own modules, with one tensor in and one out.

Parameters, their values and the numerics are transformers' own; what its model computes once for all blocks, each block computes
for itself.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models.huggingface import channels

__all__ = ["Block", "Embedding", "Head", "LanguageModelLayer", "Norm", "Router"]


@dataclass(frozen=True)
class Router:
    """Where a block decides which experts a token goes to.

    Args:
        name: name of the module inside the block.
        output: which element of what it returns are its logits.
    """

    name: str
    output: int

    def listen(self, block: nn.Module, logits: list[Tensor]) -> AbstractContextManager[Any]:
        """Append the logits of every call to a list, inside the context."""
        router = block.get_submodule(self.name)
        return router.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[self.output]))


class LanguageModelLayer(nn.Module):
    """What all layers have in common.

    Args:
        config: configuration of the whole model.
        experts: how many experts travel beside the hidden states; 0 without a router loss.
        parts: attributes of this layer, and where transformers has the same modules: ``{"norm": "model.norm"}``.
    """

    def __init__(self, config: Any, experts: int, parts: dict[str, str]) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.parts = parts

    @property
    def width(self) -> int:
        """Channels C of the hidden states."""
        return int(self.config.hidden_size)

    def original_state(self) -> dict[str, Tensor]:
        """This layer's ``state_dict`` with the keys that the unsplit model of transformers has."""
        return {
            f"{path}.{key}": value for name, path in self.parts.items() for key, value in getattr(self, name).state_dict().items()
        }


class Embedding(LanguageModelLayer):
    """Tokens ``(B, T)``, or :func:`~lightning_sentinel.models.huggingface.tokens_and_mask` ``(B, T, 2)``, to ``(B, T, C + S)``.

    Args:
        config: configuration of the whole model.
        experts: how many experts travel beside the hidden states.
        parts: where transformers has the embeddings.
        tokens: the embedding of tokens.
        positions: the embedding of positions, of the families that learn one.
        dropout: what both of them go through.
    """

    def __init__(
        self,
        config: Any,
        experts: int,
        parts: dict[str, str],
        tokens: nn.Module,
        positions: nn.Module | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__(config, experts, parts)
        self.tokens = tokens
        if positions is not None:
            self.positions = positions
        self.dropout = dropout or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Look up every token.

        Raises:
            ConfigurationError: if there are more tokens than learned positions.
        """
        input_ids_BT, mask_BT = (x[..., 0], x[..., 1]) if x.ndim == 3 else (x, None)
        hidden_BTC = self.tokens(input_ids_BT)
        if hasattr(self, "positions"):
            length = input_ids_BT.shape[1]
            longest = self.config.max_position_embeddings
            if length > longest:
                raise ConfigurationError(
                    f"A sequence of {length} tokens is too long for this model, which has max_position_embeddings={longest}: use"
                    " shorter sequences."
                )
            hidden_BTC = hidden_BTC + self.positions(_positions(hidden_BTC))
        hidden_BTC = self.dropout(hidden_BTC)
        return channels.join(hidden_BTC, channels.beside(hidden_BTC, mask_BT, self.experts))


class Block(LanguageModelLayer):
    """One decoder block, ``(B, T, C + S) -> (B, T, C + S)``.

    Args:
        config: configuration of the whole model.
        experts: how many experts travel beside the hidden states.
        parts: where transformers has the block.
        block: transformers' decoder block.
        rotary: makes the rotary tables, of the families that have them.
        windowed: whether it looks back only as far as ``config.sliding_window``.
        router: whose decisions are taken note of.
    """

    def __init__(
        self,
        config: Any,
        experts: int,
        parts: dict[str, str],
        block: nn.Module,
        rotary: nn.Module | None = None,
        windowed: bool = False,
        router: Router | None = None,
    ) -> None:
        super().__init__(config, experts, parts)
        self.block = block
        self.rotary = rotary
        self.windowed = windowed
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; the mask and what routers decided go through beside the hidden states."""
        hidden_BTC, side_BTS = channels.split(x, self.width)
        positions_1T = _positions(hidden_BTC)
        arguments: dict[str, Any] = {"position_ids": positions_1T, "use_cache": False}
        if self.rotary is not None:
            arguments["position_embeddings"] = self.rotary(hidden_BTC, position_ids=positions_1T)
        mask = self._causal_mask(hidden_BTC, channels.attended(side_BTS), positions_1T)
        logits: list[Tensor] = []
        with contextlib.nullcontext() if self.router is None else self.router.listen(self.block, logits):
            hidden_BTC = self.block(hidden_BTC, attention_mask=mask, **arguments)
        for decided in logits:
            side_BTS = channels.with_routing(side_BTS, decided, self.config.num_experts_per_tok)
        return channels.join(hidden_BTC, side_BTS)

    def _causal_mask(self, hidden_BTC: Tensor, attended_BT: Tensor, positions_1T: Tensor) -> Any:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        create = create_sliding_window_causal_mask if self.windowed else create_causal_mask
        return create(
            config=self.config,
            inputs_embeds=hidden_BTC,
            attention_mask=attended_BT,
            past_key_values=None,
            position_ids=positions_1T,
        )


class Norm(LanguageModelLayer):
    """What follows the last block, ``(B, T, C + S) -> (B, T, C + S)``.

    Args:
        config: configuration of the whole model.
        experts: how many experts travel beside the hidden states.
        parts: where transformers has the norm.
        norm: the norm.
    """

    def __init__(self, config: Any, experts: int, parts: dict[str, str], norm: nn.Module) -> None:
        super().__init__(config, experts, parts)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Norm the hidden states."""
        hidden_BTC, side_BTS = channels.split(x, self.width)
        return channels.join(self.norm(hidden_BTC), side_BTS)


class Head(LanguageModelLayer):
    """Hidden states to logits, ``(B, T, C + S) -> (B, T, V)``; with a router loss ``(B, T, V + R)``.

    Args:
        config: configuration of the whole model.
        experts: how many experts travel beside the hidden states.
        parts: where transformers has the head.
        head: the linear layer.
    """

    def __init__(self, config: Any, experts: int, parts: dict[str, str], head: nn.Module) -> None:
        super().__init__(config, experts, parts)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Predict the next token after every token."""
        hidden_BTC, side_BTS = channels.split(x, self.width)
        logits_BTV: Tensor = self.head(hidden_BTC)
        return torch.cat((logits_BTV, side_BTS[..., 1:]), dim=-1) if self.experts else logits_BTV


def _positions(hidden_BTC: Tensor) -> Tensor:
    """Those that transformers takes when none are given: from 0, whether a row starts with padding or not."""
    return torch.arange(hidden_BTC.shape[1], device=hidden_BTC.device).unsqueeze(0)
