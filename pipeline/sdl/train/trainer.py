"""Training one dictionary, step by step. A step is a function of (state, batch): no clock, no global randomness.

Nothing here reads a store or knows where a batch is from: `workers.train.trainer` feeds several trainers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import JumpReLU
from pipeline.sdl.dictionary.dictionary import Block, Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation, not_finite_columns
from pipeline.sdl.train.config import TrainingConfig, check_training
from pipeline.sdl.train.losses import unit_rows
from pipeline.sdl.train.objective import Anchors, Evaluated, evaluate
from pipeline.sdl.train.resampling import resample

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
"""For losses that sum the error over dimensions, as the papers' do; ours is divided by d, and so is this."""
SLAB = 512
"""Decoder rows that are normalised at once: they stay in the cache."""


@dataclass(frozen=True)
class StepMetrics:
    """What a step did, before its update."""

    loss: float
    fvu: float
    l0: float
    dead_share: float
    anchor_cosine: float | None
    """Mean cosine of the anchored latents' decoder rows with their anchors; None without anchors."""
    resampled: int = 0
    """Latents that began anew after it."""


class DictionaryTrainer:
    """A dictionary with its optimiser. Works in the normalised space; `result` folds the normalisation in."""

    def __init__(
        self,
        dictionary: Dictionary,
        config: TrainingConfig,
        x_norm: Normalisation,
        y_norm: Normalisation,
        anchors: Anchors | None = None,
        device: str = "cpu",
    ):
        """`anchors` are directions of the raw activations; their lengths do not matter.

        Raises InputError where dictionary, objective and anchors do not fit together."""
        check_training(dictionary.config, config, anchors)
        self.dictionary = dictionary
        self.config = config
        self.device = torch.device(device)
        self.products = config.products.on(device)
        self.x_norm, self.y_norm = x_norm.to(device), y_norm.to(device)
        self.anchors = None if anchors is None else normalised_anchors(anchors, self.x_norm, self.y_norm)
        # On the CPU: the same weights on every device.
        dictionary.initialise(config.seed, config.initialisation, tied=config.tied)
        dictionary.to(device)
        for block in dictionary.each_block():
            block.free_norms = config.decoder_norm == "free"
        if self.anchors is not None and config.anchors_first:
            start_at_anchors(dictionary, self.anchors)
        self.step_number = 0
        self.silent_rows = torch.zeros(dictionary.config.total_latents, dtype=torch.int64, device=device)
        eps = ADAM_EPS / dictionary.config.d_out
        self.optimizer = torch.optim.Adam(
            dictionary.parameters(), lr=0.0, betas=ADAM_BETAS, eps=eps, fused=config.fused
        )

    def step(self, x: Tensor, y: Tensor) -> StepMetrics:
        """Take one step on raw activations x [rows, d_in], y [rows, d_out] (the same tensor where output = input).

        Raises InputError if the loss is not finite."""
        model, config = self.dictionary, self.config
        target = self.y_norm(y.to(self.device, non_blocking=True))
        inputs = target if y is x else self.x_norm(x.to(self.device, non_blocking=True))
        dead = self.dead()
        dead_share = dead.float().mean().item()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.products.dense == "bfloat16"):
            found = evaluate(
                config.objective,
                model,
                inputs,
                target,
                model.codes(inputs, self.products),
                dead if dead_share else None,
                self.anchors,
                self.step_number / config.steps,
            )
        loss = found.loss.item()
        if not math.isfinite(loss):
            raise InputError(_not_finite(self.step_number, x, y))
        anchor_cosine = self.anchor_cosine()
        found.loss.backward()
        self._update()
        firings = torch.cat([code.firings() for code in found.codes])
        self.silent_rows = torch.where(firings > 0, 0, self.silent_rows + len(x))
        resampled = self._resample_if_due(inputs, found)
        self.step_number += 1
        return StepMetrics(
            loss=loss,
            fvu=found.fvu.item(),
            l0=firings.sum().item() / len(x),
            dead_share=dead_share,
            anchor_cosine=anchor_cosine,
            resampled=resampled,
        )

    def dead(self) -> Tensor:
        """bool [total latents]: silent for at least `dead_after_rows`."""
        return self.silent_rows >= self.config.dead_after_rows

    def anchor_cosine(self) -> float | None:
        if self.anchors is None or self.anchors.decoder is None:
            return None
        cosines = [
            functional.cosine_similarity(
                block.W_dec[: self.anchors.count].detach(), self.anchors.decoder[:, block.shape.writes], dim=1
            )
            for block in self.dictionary.each_block()
        ]
        return torch.cat(cosines).mean().item()

    def result(self) -> Dictionary:
        """The dictionary on raw activations, on the CPU. A BatchTopK one is still to be calibrated."""
        return self.dictionary.folded(self.x_norm, self.y_norm).cpu()

    def competing(self) -> list[Tensor | None]:
        """For each block the weights [latents] with which preactivations compete in a batch; see `calibrate`."""
        return [block.selection_weights() for block in self.dictionary.each_block()]

    @torch.no_grad()
    def _update(self) -> None:
        config, blocks = self.config, self.dictionary.each_block()
        self._tie_gradients()
        if config.decoder_norm == "unit":  # drop the gradient along decoder rows, and renormalise after the step
            for block in blocks:
                _drop_parallel(block)
        if config.clip is not None:
            self._clip_gradients(config.clip / self.dictionary.config.d_out)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.step_number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for block in blocks:
            if config.decoder_norm == "unit":
                _renormalise(block)
            if isinstance(block.activation, JumpReLU):
                block.own("threshold").clamp_(min=0)

    def _clip_gradients(self, largest: float) -> None:
        """Scale all gradients to a norm of at most `largest` together; shared decoders count once, not once a site."""
        shape, grads = self.dictionary.config, [p.grad for p in self.dictionary.parameters() if p.grad is not None]
        square = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).square().sum()
        if shape.shared_latents and (grad := self.dictionary.W_dec.grad) is not None:
            copies = torch.linalg.vector_norm(grad[: shape.shared_latents]).square()
            square -= copies * (1 - 1 / len(shape.output))
        scale = (largest / square.sqrt()).clamp(max=1)
        for grad in grads:
            grad.mul_(scale)

    def _tie_gradients(self) -> None:
        """Shared latents have one decoder: each site's copy gets the sum of all gradients, and so the same update."""
        shape = self.dictionary.config
        if shape.shared_latents and (grad := self.dictionary.W_dec.grad) is not None:
            shared = grad[: shape.shared_latents].view(shape.shared_latents, len(shape.output), -1)
            shared.copy_(shared.sum(1, keepdim=True).expand_as(shared))

    def _resample_if_due(self, inputs: Tensor, found: Evaluated) -> int:
        plan = self.config.resampling
        left = None if plan is None else plan.steps_left(self.step_number, self.config.steps, self.config.batch_rows)
        if plan is None or left is None:
            return 0
        revived = self.resample(inputs, found.residual, left, plan.encoder_scale)
        self.silent_rows[revived] = 0
        return len(revived)

    def resample(self, inputs: Tensor, residual: Tensor, batches_left: int, encoder_scale: float) -> Tensor:
        """Let dead latents begin anew at some of a batch's rows; see `pipeline.sdl.train.resampling.resample`."""
        return resample(
            self.dictionary,
            self.optimizer,
            self.dead(),
            inputs,
            residual,
            kept=0 if self.anchors is None else self.anchors.count,
            batches_left=batches_left,
            encoder_scale=encoder_scale,
            seed=(self.config.seed * 1_000_003 + self.step_number) % 2**63,
        )

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


def normalised_anchors(anchors: Anchors, x_norm: Normalisation, y_norm: Normalisation) -> Anchors:
    """Directions of raw activations -> the same in the normalised space, float32, where the normalisation is."""
    encoder = None if anchors.encoder is None else anchors.encoder.to(x_norm.scale) * x_norm.scale
    decoder = None if anchors.decoder is None else anchors.decoder.to(y_norm.scale) * y_norm.scale
    return Anchors(encoder, decoder)


@torch.no_grad()
def start_at_anchors(dictionary: Dictionary, anchors: Anchors) -> None:
    for block in dictionary.each_block():
        for W, side, columns in (
            (block.W_enc, anchors.encoder, block.shape.reads),
            (block.W_dec, anchors.decoder, block.shape.writes),
        ):
            if side is not None:
                W[: len(side)] = unit_rows(side[:, columns])
    dictionary.tie_shared()


def _drop_parallel(block: Block) -> None:
    """Take from the decoder's gradient what is parallel to its rows, which have norm 1."""
    grad, W = block.W_dec.grad, block.W_dec
    assert grad is not None
    for start in range(0, len(W), SLAB):
        part, rows = grad[start : start + SLAB], W[start : start + SLAB]
        part.addcmul_(rows, torch.linalg.vecdot(part, rows)[:, None], value=-1)


def _renormalise(block: Block) -> None:
    for start in range(0, len(block.W_dec), SLAB):
        rows = block.W_dec[start : start + SLAB]
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12))


def _not_finite(step: int, x: Tensor, y: Tensor) -> str:
    sides = {"input": not_finite_columns(x), "output": not_finite_columns(y)}
    if wrong := "; ".join(f"{columns} of the {side}" for side, columns in sides.items() if columns):
        return f"step {step}: activations are nan or infinite in {wrong}; verify the store"
    return f"step {step}: the loss is not finite though the activations are: lower the learning rate, or clip gradients"
