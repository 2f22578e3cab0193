"""Training one dictionary, step by step. A step is a function of (state, batch): no clock, no global randomness.

Nothing here reads a store or knows where a batch is from; `workers.trainer` feeds several trainers from one stream.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.dictionary import Dictionary, Normalisation, top_k
from pipeline.errors import InputError
from pipeline.losses import anchoring_loss, auxiliary_loss, reconstruction_loss, unit_rows

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class TrainingConfig:
    """How a dictionary is trained."""

    steps: int
    batch_rows: int
    learning_rate: float
    """Peak of Adam's learning rate."""
    warmup_share: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which it falls to zero."""
    auxiliary_weight: float = 1 / 32
    """Weight of AuxK (Gao et al. 2024)."""
    dead_after_rows: int = 10_000_000
    """A latent that was silent for so many rows counts as dead."""
    anchor_weight: float = 0.1
    """lambda_a of the anchoring term."""
    seed: int = 0


@dataclass(frozen=True)
class StepMetrics:
    """What a step did, before its update."""

    loss: float
    fvu: float
    l0: float
    dead_share: float
    anchor_cosine: float | None
    """Mean cosine of the anchored latents' decoder rows with their anchors; None without anchors."""


class DictionaryTrainer:
    """A dictionary with its optimiser. Works in the normalised space; `result` folds the normalisation in."""

    def __init__(
        self,
        dictionary: Dictionary,
        config: TrainingConfig,
        x_norm: Normalisation,
        y_norm: Normalisation,
        anchors: tuple[Tensor, Tensor] | None = None,
        device: str = "cpu",
    ):
        """`anchors` are directions [k, d_in] and [k, d_out] of the raw activations; their lengths do not matter."""
        self.dictionary = dictionary
        self.config = config
        self.device = torch.device(device)
        self.x_norm, self.y_norm = x_norm.to(device), y_norm.to(device)
        self.anchors = None if anchors is None else (unit_rows(anchors[0].to(device)), unit_rows(anchors[1].to(device)))
        dictionary.initialise(config.seed)  # on the CPU, so that the weights are the same on every device
        dictionary.to(device)
        if self.anchors is not None:
            if len(self.anchors[0]) > dictionary.config.latents:
                raise InputError(f"{len(self.anchors[0])} anchors do not fit into {dictionary.config.latents} latents")
            with torch.no_grad():  # start where the pull ends, so that no latent has to cross the space
                dictionary.W_enc[: len(self.anchors[0])] = self.anchors[0]
                dictionary.W_dec[: len(self.anchors[1])] = self.anchors[1]
        self.step_number = 0
        self.silent_rows = torch.zeros(dictionary.config.latents, dtype=torch.int64, device=device)
        self.optimizer = torch.optim.Adam(dictionary.parameters(), lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)

    def step(self, x: Tensor, y: Tensor) -> StepMetrics:
        """Take one step on raw activations x [rows, d_in], y [rows, d_out] (the same tensor for an SAE)."""
        model, config = self.dictionary, self.config
        target = self.y_norm(y.to(self.device, non_blocking=True))
        inputs = target if y is x else self.x_norm(x.to(self.device, non_blocking=True))
        preactivations = model.preactivations(inputs)
        z = top_k(preactivations, model.config.k)
        y_hat = model.decode(z)
        fvu = reconstruction_loss(target, y_hat, float(model.config.d_out))
        loss = fvu
        dead = self.silent_rows >= config.dead_after_rows
        if config.auxiliary_weight and bool(dead.any()):
            auxiliary = auxiliary_loss(
                target - y_hat, preactivations, dead, model.W_dec, max(1, model.config.d_out // 2)
            )
            loss = loss + config.auxiliary_weight * auxiliary
        if self.anchors is not None:
            loss = loss + config.anchor_weight * anchoring_loss(model.W_enc, model.W_dec, *self.anchors)
        anchor_cosine = self.anchor_cosine()
        loss.backward()
        self._update()
        active = z.detach() > 0
        self.silent_rows = torch.where(active.any(0), 0, self.silent_rows + len(x))
        return StepMetrics(
            loss=loss.item(),
            fvu=fvu.item(),
            l0=active.sum().item() / len(x),
            dead_share=dead.float().mean().item(),
            anchor_cosine=anchor_cosine,
        )

    def anchor_cosine(self) -> float | None:
        if self.anchors is None:
            return None
        rows = self.dictionary.W_dec[: len(self.anchors[1])].detach()
        return functional.cosine_similarity(rows, self.anchors[1], dim=1).mean().item()

    def result(self) -> Dictionary:
        """The dictionary on raw activations, on the CPU."""
        return self.dictionary.folded(self.x_norm, self.y_norm).cpu()

    def _update(self) -> None:
        W_dec = self.dictionary.W_dec
        assert W_dec.grad is not None
        with torch.no_grad():
            # Decoder rows keep norm 1: drop the gradient along them, and renormalise after the step.
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.step_number)
            self.optimizer.step()
            self.optimizer.zero_grad()
            W_dec.copy_(unit_rows(W_dec))
        self.step_number += 1

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to zero."""
        config = self.config
        warmup, decay = config.warmup_share * config.steps, config.decay_share * config.steps
        rise = (step + 1) / warmup if warmup else 1.0
        fall = (config.steps - step) / decay if decay else 1.0
        return config.learning_rate * max(0.0, min(1.0, rise, fall))

    # ---- a checkpoint is a flat dict of tensors, so that it can be safetensors

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on. The tensors are the live ones: save them before the next step."""
        state = {f"weights.{name}": p.detach() for name, p in self.dictionary.named_parameters()}
        for name, parameter in self.dictionary.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"adam.{name}.{key}"] = value
        state["silent_rows"] = self.silent_rows
        state["step"] = torch.tensor(self.step_number)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on exactly where `state` was taken."""
        with torch.no_grad():
            for name, parameter in self.dictionary.named_parameters():
                parameter.copy_(state[f"weights.{name}"])
                self.optimizer.state[parameter] = {
                    key.rpartition(".")[2]: value.to(self.device, copy=True)
                    for key, value in state.items()
                    if key.startswith(f"adam.{name}.")
                }
        self.silent_rows = state["silent_rows"].to(self.device, copy=True)
        self.step_number = int(state["step"])


def default_learning_rate(latents: int) -> float:
    """2e-4 / sqrt(latents / 2^14), the scaling rule of Gao et al. 2024."""
    return float(2e-4 / (latents / 2**14) ** 0.5)
