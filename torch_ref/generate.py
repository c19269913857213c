"""The course's sampling loop: the whole text forward again for each new token."""

import torch

from torch_ref.model import Model5


@torch.no_grad()
def generate(
    model: Model5, tokens_BxT: torch.Tensor, n_tokens: int, temperature: float = 1.0
) -> torch.Tensor:
    """The n_tokens that follow, [B, n_tokens], drawn from softmax(logits / temperature)."""
    model.eval()
    for _ in range(n_tokens):
        logits_BxV = model(tokens_BxT[:, -model.config.seq_len :])[:, -1]
        probabilities_BxV = torch.softmax(logits_BxV / temperature, dim=-1)
        token_Bx1 = torch.multinomial(probabilities_BxV, 1)
        tokens_BxT = torch.cat([tokens_BxT, token_Bx1], dim=1)
    return tokens_BxT[:, -n_tokens:]
