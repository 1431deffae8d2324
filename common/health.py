"""Is it learning or collapsing? Figures that need no labels, on the embeddings of one batch.

Loss is not quality: a low loss can be a collapse, and a flat one can go with better features.
These figures tell the two apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def embedding_metrics(z1: Tensor, z2: Tensor) -> dict[str, float]:
    """Health of two views' embeddings, (N, D) each, normalised here.

    - feature_std: mean deviation of a coordinate of unit vectors times sqrt(D); 1 where they are
      spread evenly over the sphere, 0 where all are one point (arXiv 2011.10566 Sec. 4.1).
    - effective_rank: exp of the entropy of the singular values, between 1 and min(N, D) (RankMe,
      arXiv 2210.02885).
    - alignment: mean squared distance of positives, 0 to 4; uniformity: log of the mean Gaussian
      potential of all pairs, 0 where all are one point, about -4 when even (arXiv 2005.10242).
    """
    here = (z.cpu() if z.device.type == "mps" else z for z in (z1, z2))  # MPS has no float64
    z1, z2 = (F.normalize(z.double(), dim=1) for z in here)
    both = torch.cat([z1, z2])
    singular = torch.linalg.svdvals(both.nan_to_num())  # it fails on NaN; the others show one
    share = singular / singular.sum()
    entropy = -(share * (share + 1e-12).log()).sum()
    potentials = [torch.pdist(z).square().mul(-2).exp().mean() for z in (z1, z2)]
    return {
        "feature_std": (both.std(0).mean() * both.shape[1] ** 0.5).item(),
        "effective_rank": entropy.exp().item(),
        "alignment": (z1 - z2).square().sum(1).mean().item(),
        "uniformity": torch.stack(potentials).mean().log().item(),
    }


def collapse_warning(figures: dict[str, float]) -> str | None:
    """What is wrong, with a hint, or None: all embeddings are (nearly) one point or one line."""
    if figures["feature_std"] < 0.1 or figures["uniformity"] > -0.1:
        what = f"all embeddings are nearly one point (feature_std {figures['feature_std']:.3f})"
    elif figures["effective_rank"] < 1.5:
        what = f"all embeddings lie on one line (effective_rank {figures['effective_rank']:.2f})"
    else:
        return None
    return (
        f"COLLAPSE: {what}. Usual causes: a learning rate too high for this batch size or "
        "optimiser, too few steps of warm-up, views without colour distortion, or a network of "
        "the other branch that gets gradients. In RUN's TensorBoard: feature_std, effective_rank, "
        "uniformity."
    )
