"""The losses: (1 − λ) CE + λ T² KL(teacher ‖ student) on the assistant's tokens, + μ · mean reconstruction, + η · the
error of hidden states at every position. A short answer has few tokens, a prompt with its image many."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperfade.data.collate import IGNORED
from hyperfade.nn import BlendLinear


@dataclass(frozen=True)
class LossTerms:
    """Scalars with gradients; `kl` holds the factor T² already."""

    cross_entropy: Tensor
    kl: Tensor
    reconstruction: Tensor
    hidden: Tensor

    def total(self, kd_weight: float, reconstruction_weight: float, hidden_weight: float) -> Tensor:
        """The loss to minimise; a term with weight 0 takes no part, not even in the graph."""
        loss = torch.zeros((), device=self.cross_entropy.device)
        for weight, term in (
            (1 - kd_weight, self.cross_entropy),
            (kd_weight, self.kl),
            (reconstruction_weight, self.reconstruction),
            (hidden_weight, self.hidden),
        ):
            if weight:
                loss = loss + weight * term
        return loss


def answer_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions that carry loss: logits (batch, length, vocabulary), labels (batch, length) → float32 logits
    (tokens, vocabulary) and their targets (tokens,). The prediction at one position is for the next."""
    targets = labels[:, 1:]
    mask = targets != IGNORED
    return logits[:, -labels.shape[1] : -1][mask].float(), targets[mask]


def answers_only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`batch` with `logits_to_keep`: the output layer sees only positions from which some row predicts an answer.

    A large vocabulary at every position of a sample costs as much as many layers. labels (rows, tokens) → (rows, kept),
    so that the label at kept + 1 is still what position kept predicts. The last position is kept beside them, because
    `answer_logits` leaves out what it predicts. For models whose forward takes `logits_to_keep`.
    """
    labels = batch["labels"]
    places = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
    last = labels.new_tensor([labels.shape[1] - 1])
    labels = torch.cat([labels.new_full((len(labels), 1), IGNORED), labels[:, places + 1]], dim=1)
    return batch | {"labels": labels, "logits_to_keep": torch.cat([places, last])}


def cross_entropy(student: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross-entropy over tokens: student logits (tokens, vocabulary), targets (tokens,)."""
    return F.cross_entropy(student, targets, label_smoothing=label_smoothing)


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) at temperature T, mean over tokens; both float32 logits (tokens, vocabulary)."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def top_k_log_probs(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of a teacher's float32 logits (tokens, vocabulary): its k likeliest tokens (tokens, k), their
    log-probabilities at temperature T (tokens, k), and the log of the mass of all others (tokens,).

    k is the vocabulary's size at most; then there are no others, and their log is -inf.
    """
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_probs, tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return tokens, log_probs, _log_rest(log_p, tokens)


def truncated_kl(student: Tensor, tokens: Tensor, log_probs: Tensor, log_rest: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) at temperature T, mean over tokens, from what `top_k_log_probs` kept of the teacher:

        KL_K = Σ_{i∈K} p_i log(p_i / q_i) + p_r log(p_r / q_r),    p_r = 1 − Σ_{i∈K} p_i,  q_r = 1 − Σ_{i∈K} q_i

    student: float32 logits (tokens, vocabulary). All tokens outside K count as one. By the log-sum inequality (Cover
    and Thomas, Elements of Information Theory, theorem 2.7.1) KL_K ≤ KL, and what is lost is p_r · KL(p given not K ‖
    q given not K). Renormalising over K instead would teach the student to give other tokens nothing: top-k caching is
    biased (Anshumann et al. 2025, arXiv 2503.16870).
    """
    log_q = F.log_softmax(student / temperature, dim=-1)
    p, q = log_probs, log_q.gather(-1, tokens)
    if tokens.shape[-1] < student.shape[-1]:
        p, q = (torch.cat([p, log_rest[:, None]], dim=-1), torch.cat([q, _log_rest(log_q, tokens)[:, None]], dim=-1))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def _log_rest(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log Σ p over all but `tokens`; not as log(1 − Σ p of those), which has no digits left where it is small."""
    return log_p.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1)


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean over layers and positions of ‖s − t‖² / ‖t‖², a scalar, float32.

    student, teacher: what enters the language model and what every layer of it makes of that, each (batch, length,
    width). mask (batch, length): 0 where a position is padding; one of another shape is not used. Errors are relative
    at every position, because a few positions of a language model have states a thousand times as large as others.
    """
    errors = [
        checkpoint(_state_error, s, t, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(student, teacher, strict=True)
    ]
    error = torch.stack(errors).mean(0)
    if mask is None or mask.shape != error.shape:
        return error.mean()
    return (error * mask).sum() / mask.sum()


def _state_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² at every position. Made again in the backward pass: float32 copies of the states of all layers
    would take more memory than the states."""
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def mean_reconstruction(blends: Iterable[BlendLinear], device: torch.device) -> Tensor:
    """Mean over layers of the relative output error that the last forward pass left; 0 where nothing was measured."""
    measured = [blend.reconstruction for blend in blends if blend.reconstruction is not None]
    return torch.stack(measured).mean() if measured else torch.zeros((), device=device)
