"""Query, key and value with the clusters that video attention has, made on the device that measures them."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.shape import Shape

__all__ = ["clustered_inputs"]

CPU = torch.device("cpu")
TOKENS_PER_TOPIC = 200
HEAD_VARIETY = 0.3  # heads differ: standard deviation of ln(spread)
OWN_TOPIC_LOGIT = 4.0  # what a query's logit gains with keys of its own topic


def clustered_inputs(shape: Shape, device: torch.device = CPU, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [1, H, N, D] as a model hands them over: transposed views of contiguous [1, N, H, D].

    Every token belongs to one of N / 200 topics at random positions (clusters are not neighbourhoods); topic sizes are
    log-normal (sigma 0.7), so that clusters are uneven. A token is amplitude * centre of its topic + unit noise
    (values: centre + 0.3 noise); centres are gaussian, one set per head. The amplitude squared is the standard
    deviation of the logits between centres, ``shape.spread`` at the median head; it differs between heads (its
    logarithm has standard deviation 0.3), and with it the density that top_p finds. A key's centre is correlated with
    its query's just so that a query's logit with its own topic is 4 larger than with others.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    topics = max(8, shape.num_tokens // TOKENS_PER_TOPIC)
    weights = torch.exp(0.7 * gaussian(topics))
    topic = torch.multinomial(weights, shape.num_tokens, replacement=True, generator=generator)
    tokens = [
        torch.empty(1, shape.num_tokens, shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
        for _ in range(3)
    ]
    for head, spread in enumerate(_spreads(shape)):
        correlation = min(0.9, OWN_TOPIC_LOGIT / (spread * shape.head_dim**0.5))
        query_centre, other, value_centre = (gaussian(topics, shape.head_dim) for _ in range(3))
        key_centre = correlation * query_centre + (1 - correlation**2) ** 0.5 * other
        amplitude = spread**0.5
        for out, centre, gain, noise in zip(
            tokens, (query_centre, key_centre, value_centre), (amplitude, amplitude, 1.0), (1.0, 1.0, 0.3), strict=True
        ):
            out[0, :, head] = gain * centre[topic] + noise * gaussian(shape.num_tokens, shape.head_dim)
    query, key, value = (x.transpose(1, 2) for x in tokens)
    return query, key, value


def _spreads(shape: Shape) -> list[float]:
    """One spread per head: quantiles of a log-normal distribution, in a scattered order."""
    ranks = (torch.arange(shape.num_heads, dtype=torch.float64) * 7 + 3) % shape.num_heads
    if len(set(ranks.tolist())) < shape.num_heads:
        ranks = torch.arange(shape.num_heads, dtype=torch.float64)
    quantiles = torch.special.ndtri((ranks + 0.5) / shape.num_heads)
    return [float(spread) for spread in shape.spread * torch.exp(HEAD_VARIETY * quantiles)]
