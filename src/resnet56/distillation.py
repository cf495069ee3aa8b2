"""Distillation: train a network towards the predictions of others (Hinton et al. 2015)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet56.data.batches import derived_seed
from resnet56.errors import UsageError
from resnet56.inference import InferenceForm, restore
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runtime import Precision

MEMBERS = 2  # tells the random numbers that choose a teacher from others of the same seed


class Teachers:
    """One or several trained networks, in their inference form.

    Args:
        checkpoints: by name.
        student: whose images they see, normalized with its constants.
        device: of the training.
        precision: of their forward pass.

    Raises:
        UsageError: a teacher has other classes than the student.
        RunError: a teacher's weights are of no use.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        student: ModelConfig,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.members: list[tuple[InferenceForm, Tensor, Tensor]] = []
        for name, checkpoint in checkpoints.items():
            net = checkpoint.config
            if net.classes != student.classes:
                raise UsageError(
                    f"teacher {name} has other classes ({', '.join(net.classes[:3])}, ...) than "
                    f"the images ({', '.join(student.classes[:3])}, ...); choose another --teacher"
                )
            # From the student's normalization to the teacher's: scale * x + shift.
            means, stds = (
                torch.tensor([getattr(one, which) for one in (student, net)], dtype=torch.float64)
                for which in ("mean", "std")
            )
            scale, shift = stds[0] / stds[1], (means[0] - means[1]) / stds[1]
            self.members.append(
                (
                    InferenceForm(restore(checkpoint, device), precision),
                    scale.float().to(device)[:, None, None],
                    shift.float().to(device)[:, None, None],
                )
            )

    @torch.no_grad()
    def probabilities(
        self, images: Tensor, temperature: float, member: int | None = None
    ) -> Tensor:
        """The teachers' mean probabilities, or one teacher's.

        Args:
            images: (B, 3, S, S), normalized and augmented as the student sees them.
            temperature: that divides the logits.
            member: which teacher; None for all.

        Returns:
            (B, C) float32.
        """
        asked = self.members if member is None else [self.members[member]]
        shares = [
            (form(images * scale + shift).float() / temperature).softmax(dim=1)
            for form, scale, shift in asked
        ]
        return torch.stack(shares).mean(dim=0)

    def random_member(self, seed: int, step: int) -> int:
        """The teacher to ask in `step`: a function of the seed and the step."""
        return derived_seed(seed, step, MEMBERS) % len(self.members)


def distillation_loss(logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the student's to the teachers' probabilities, in nats.

    It is multiplied by the squared temperature, so that its gradient has about the same size at
    every temperature.

    Args:
        logits: the student's, (B, C).
        probabilities: the teachers', (B, C), at the same temperature.
        temperature: that divides the logits.

    Returns:
        The mean over the batch.
    """
    log_shares = (logits / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(log_shares, probabilities, reduction="batchmean")


def fingerprint(checkpoint: Checkpoint) -> str:
    """A SHA-256 of the weights, the same for equal weights in any file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.model.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.double().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
