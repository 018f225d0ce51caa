"""What travels between the layers of a language model: one tensor, the hidden states with a few more channels behind them.

A pipeline carries exactly one floating-point tensor from stage to stage, and each layer sees only what the one before it returned.
What blocks need besides the hidden states is either the same for all samples and made anew in each block (positions, rotary tables,
the causal mask), or it rides along as channels:

- one channel says which tokens are no padding: 1 and -1 in turns for a token, 0 for padding, which every floating-point type holds
  exactly;
- where a router loss is trained, each expert has two more, the sum over the blocks so far of the probabilities that the routers
  gave it (which gradients flow back through), and of how often it was chosen.

The suffix of a tensor's name is its shape: B sequences, T tokens, C channels of the hidden states, S channels beside them, E
experts, R = 2 E channels about routers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError

__all__ = ["attended", "beside", "join", "split", "tokens_and_mask", "with_routing"]


def tokens_and_mask(input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
    """What goes into the first layer: tokens, and with each of them whether it is one.

    Args:
        input_ids_BT: int64 of shape ``(B, T)``.
        attention_mask_BT: a mask of the same shape, 0 for padding; ``None`` if nothing is masked.

    Returns:
        int64 of shape ``(B, T, 2)``, or the tokens as they are if there is no mask.

    Raises:
        ConfigurationError: if the shapes differ.

    Example:
        >>> tokens_and_mask(torch.tensor([[0, 7]]), torch.tensor([[0, 1]])).tolist()
        [[[0, 0], [7, 1]]]
    """
    if attention_mask_BT is None:
        return input_ids_BT
    if attention_mask_BT.shape != input_ids_BT.shape:
        raise ConfigurationError(
            f"attention_mask has shape {tuple(attention_mask_BT.shape)} and input_ids {tuple(input_ids_BT.shape)}. The mask says of"
            " each token whether it is padding, so both must have the same shape (B, T)."
        )
    return torch.stack((input_ids_BT, attention_mask_BT.to(input_ids_BT.dtype)), dim=-1)


def beside(hidden_BTC: Tensor, mask_BT: Tensor | None, experts: int) -> Tensor:
    """The channels beside the first hidden states, ``(B, T, 1 + 2 * experts)``: the mask, and nothing routed so far."""
    side_BTS = hidden_BTC.new_zeros(*hidden_BTC.shape[:2], 1 + 2 * experts)
    # In turns, so that the channel varies in a micro-batch without padding about as much as in one with some: verification compares
    # how much channels vary on a logarithmic scale, on which a constant is far from anything else.
    side_BTS[:, ::2, 0] = 1
    side_BTS[:, 1::2, 0] = -1
    if mask_BT is not None:
        side_BTS[..., 0] *= mask_BT != 0
    return side_BTS


def join(hidden_BTC: Tensor, side_BTS: Tensor) -> Tensor:
    """The one tensor that travels."""
    return torch.cat((hidden_BTC, side_BTS), dim=-1)


def split(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Hidden states and the channels beside them, of what :func:`join` put together."""
    # Contiguous as in the unsplit model, because kernels may add up in another order where rows are apart.
    return x[..., :width].contiguous(), x[..., width:]


def attended(side_BTS: Tensor) -> Tensor:
    """Which tokens are no padding, bool of shape ``(B, T)``."""
    # Half way, so that a worker that sends other values than these makes a wrong mask but no error.
    return side_BTS[..., 0].abs() > 0.5


def with_routing(side_BTS: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Add what one router decided.

    Args:
        side_BTS: the channels beside the hidden states.
        logits: ``(B * T, E)``, what the router returned.
        top_k: how many experts it chooses for a token.

    Example:
        >>> side = beside(torch.zeros(1, 1, 8), None, experts=2)
        >>> with_routing(side, torch.tensor([[0.0, 1.0]]), top_k=1)
        tensor([[[1.0000, 0.2689, 0.7311, 0.0000, 1.0000]]])
    """
    probabilities = logits.softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    counts = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0)
    routed = torch.cat((probabilities, counts), dim=-1).to(side_BTS.dtype)
    return torch.cat((side_BTS[..., :1], side_BTS[..., 1:] + routed.view(*side_BTS.shape[:2], -1)), dim=-1)
