"""Knowledge distillation from trained models (Hinton et al. 2015)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet56.data.batches import derive_seed
from resnet56.errors import UsageError, abbreviate, option
from resnet56.inference import InferenceModel, restore
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runtime import Precision

TEACHER_STREAM = 2  # separates the random choice of teachers from other uses of the seed


class Teachers:
    """One or more trained models that teach another model.

    Args:
        checkpoints: mapping from the names of the teachers to their checkpoints.
        student: configuration of the student.
        device: training device.
        precision: precision of the teachers' forward pass.

    Raises:
        UsageError: the classes of a teacher differ from those of the student.
        RunError: the weights of a teacher are not valid.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        student: ModelConfig,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.members: list[tuple[InferenceModel, Tensor, Tensor]] = []
        for name, checkpoint in checkpoints.items():
            teacher = checkpoint.config
            if teacher.classes != student.classes:
                raise UsageError(
                    f"the classes of teacher {name} ({abbreviate(teacher.classes)}) differ from "
                    f"those of the images ({abbreviate(student.classes)}); choose another "
                    f"{option('teacher')}"
                )
            # scale * x + shift converts the student's normalization to the teacher's.
            means, stds = (
                torch.tensor([getattr(c, name) for c in (student, teacher)], dtype=torch.float64)
                for name in ("mean", "std")
            )
            scale, shift = stds[0] / stds[1], (means[0] - means[1]) / stds[1]
            self.members.append(
                (
                    InferenceModel(restore(checkpoint, device), precision),
                    scale.float().to(device)[:, None, None],
                    shift.float().to(device)[:, None, None],
                )
            )

    @torch.no_grad()
    def probabilities(
        self, images: Tensor, temperature: float, member: int | None = None
    ) -> Tensor:
        """Return the mean probabilities of the teachers, or the probabilities of one teacher.

        Args:
            images: the input of the student: normalized and augmented images (B, 3, S, S).
            temperature: divisor of the logits.
            member: index of the teacher. By default, all teachers are used.

        Returns:
            float32 probabilities (B, C).
        """
        members = self.members if member is None else [self.members[member]]
        outputs = [
            (model(images * scale + shift).float() / temperature).softmax(dim=1)
            for model, scale, shift in members
        ]
        return torch.stack(outputs).mean(dim=0)

    def random_member(self, seed: int, step: int) -> int:
        """Return the index of a random teacher. The index depends only on the arguments."""
        return derive_seed(seed, step, TEACHER_STREAM) % len(self.members)


def distillation_loss(logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Return the Kullback-Leibler divergence KL(teachers || student), in nats.

    The function multiplies the divergence by the squared temperature. Gradients then have about the
    same magnitude at every temperature.

    Args:
        logits: logits (B, C) of the student.
        probabilities: probabilities (B, C) of the teachers at the same temperature.
        temperature: divisor of the logits.

    Returns:
        A scalar, the mean over the batch.
    """
    log_probabilities = (logits / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(log_probabilities, probabilities, reduction="batchmean")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 digest of the weights, which does not depend on the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.model.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.double().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
