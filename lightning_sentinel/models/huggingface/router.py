"""The load-balancing loss of a mixture of experts, from what travelled through the pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["router_loss"]


def router_loss(routed_BTR: Tensor, attention_mask_BT: Tensor | None, top_k: int) -> Tensor:
    """How unevenly the routers of all blocks use their experts: ``top_k`` if evenly.

    ``E * sum_e f_e P_e``, where ``f_e`` is how often expert ``e`` is chosen and ``P_e`` the mean probability that routers gave it,
    over all tokens and blocks (Switch Transformer, arXiv 2101.03961, equations 4 to 6), as transformers computes it from the logits
    of all blocks.

    Args:
        routed_BTR: the last ``2 * E`` channels of what the last layer returned.
        attention_mask_BT: 0 for padding, which does not count; ``None`` says that there is none.
        top_k: how many experts a router chooses for a token.

    Returns:
        A 0-dim float32 tensor; 0 if all tokens are padding.

    Example:
        >>> routed = torch.tensor([[[0.5, 0.5, 1.0, 0.0], [0.5, 0.5, 0.0, 1.0]]])
        >>> router_loss(routed, None, top_k=1)
        tensor(1.)
    """
    routed_BTR = routed_BTR.float()
    if attention_mask_BT is not None:
        routed_BTR = routed_BTR * attention_mask_BT.unsqueeze(-1)
    probabilities_E, counts_E = routed_BTR.sum(dim=(0, 1)).chunk(2)
    # Every router chose top_k experts for every token that counts, so that the counts tell how many rows there are.
    rows = (counts_E.sum() / top_k).clamp(min=1.0)
    return len(counts_E) * torch.sum((counts_E / rows) * (probabilities_E / rows))
