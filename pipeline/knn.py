"""A k-nearest-neighbour vote of the training images beside a trained network (the idea of arXiv:1911.00172)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import DataError

COMPONENTS = 64     # principal components of the features that are compared
TEMPERATURE = 0.03  # of the softmax over cosines that weighs the neighbours


def split_head(network: nn.Module) -> tuple[nn.Sequential, nn.Module]:
    """Return a network's layers before its last child, which give the features, and that child."""
    *body, head = network.children()
    return nn.Sequential(*body), head


class KNNClassifier(nn.Module):
    """Blends the network's softmax with a k-nearest-neighbour vote over training features.

    Maps [B, 1, S, S] to log-probabilities [B, classes]. Similarity is the cosine of the features' first principal
    components. The index is `projection` [features, COMPONENTS], `keys` [N, COMPONENTS] and `targets` [N].
    """

    def __init__(self, network: nn.Module, neighbors: int, weight: float, index: dict[str, Tensor]):
        super().__init__()
        self.network, self.neighbors, self.weight = network, min(neighbors, len(index["keys"])), weight
        for name in ("projection", "keys", "targets"):
            self.register_buffer(name, index[name])

    @property
    def index(self) -> dict[str, Tensor]:
        """The index as it is saved."""
        return {name: value.cpu() for name, value in self.named_buffers(recurse=False)}

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities [B, classes]."""
        body, head = split_head(self.network)
        features = body(x)
        with torch.autocast(x.device.type, enabled=False):  # in bf16 many cosines would be equal
            query = F.normalize(features.float() @ self.projection, dim=1)
            cosines, places = (query @ self.keys.float().T).topk(self.neighbors)
        probabilities = head(features).float().softmax(dim=1)
        weights = (cosines / TEMPERATURE).softmax(dim=1)
        vote = torch.zeros_like(probabilities).scatter_add_(1, self.targets[places], weights)
        return torch.lerp(probabilities, vote, self.weight).log()


def build_knn_index(features: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the index of training features [N, width] and class numbers [N]. Raises DataError if products overflow."""
    covariance = features.T @ features
    if not covariance.isfinite().all():
        raise DataError("the network's features are too large for the nearest-neighbour vote: its training diverged; "
                        "lower --learning-rate, or switch the vote off with --knn-neighbors 0")
    # In float32, eigh does not always converge on the features of few images.
    projection = torch.linalg.eigh(covariance.double()).eigenvectors[:, -COMPONENTS:].float().contiguous()
    keys = F.normalize(features @ projection, dim=1).to(torch.bfloat16)  # precise enough, at half the size
    return {"projection": projection, "keys": keys, "targets": targets}


def empty_knn_index(network: nn.Module, count: int) -> dict[str, Tensor]:
    """Return an index of zeros for as many training images, to measure how long its vote takes."""
    _, head = split_head(network)
    width = next(layer for layer in head.modules() if isinstance(layer, nn.Linear)).in_features
    return {"projection": torch.zeros(width, COMPONENTS), "targets": torch.zeros(count, dtype=torch.int64),
            "keys": torch.zeros(count, COMPONENTS, dtype=torch.bfloat16)}
