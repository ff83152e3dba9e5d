"""Projection heads for pretraining and classifiers for fine-tuning, by name."""

from __future__ import annotations

from torch import nn

from pipeline.registry import HEADS

__all__ = ["gallbladder_classifier", "linear_classifier", "projection_mlp"]


def projection_mlp(feature_dim: int, embedding_dim: int, hidden_dim: int | None = None) -> nn.Sequential:
    """Linear - ReLU - Linear as in MoCo v2 and UCL: no batch norm, PyTorch's default initialisation. [B, F] -> [B, D]."""
    hidden = hidden_dim or feature_dim
    return nn.Sequential(nn.Linear(feature_dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embedding_dim))


@HEADS.register("linear")
def linear_classifier(feature_dim: int, classes: int) -> nn.Module:
    """One linear layer. [B, F] -> [B, C] logits."""
    return nn.Linear(feature_dim, classes)


@HEADS.register("mlp")
def gallbladder_classifier(feature_dim: int, classes: int) -> nn.Module:
    """Linear(F, 256) - ReLU - Dropout(0.4) - Linear(256, C), weights N(0, 0.01), biases 0.

    The classifier of the published gallbladder fine-tuning (UCL, Basu et al., MICCAI 2022). [B, F] -> [B, C] logits.
    """
    head = nn.Sequential(nn.Linear(feature_dim, 256), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(256, classes))
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return head
