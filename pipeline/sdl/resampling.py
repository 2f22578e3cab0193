"""Dead latents begin anew at inputs that are reconstructed badly (Bricken et al. 2023, appendix "neuron resampling").

At some shares of the training, inputs are drawn with probability proportional to their squared loss; each dead latent
gets one: its decoder row that input's direction, its encoder row the same at 0.2 of the mean norm of the alive encoder
rows, bias zero. Its momentum is zero, its second moments are the alive latents' mean: were they zero too, Adam would
move it by some 30 learning rates whenever one of its few inputs comes, away from where it was put, and it would die
again. An event lasts over several batches, and each revives its part of what is still dead, so that latents are drawn
from many rows without any being kept: the state stays what a checkpoint holds. Anchored latents are left alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.sdl.ranges import positive, whole

if TYPE_CHECKING:
    from pipeline.sdl.training import DictionaryTrainer


@dataclass(frozen=True)
class Resampling:
    """When and from how many rows."""

    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the steps at which an event begins."""
    rows: int = 819_200
    """Rows that an event draws from, over several batches; fewer where the next event comes first."""
    encoder_scale: float = 0.2
    """Norm of a new encoder row, in mean norms of the alive ones."""

    def reasons(self) -> list[str]:
        """Why it cannot be so: numbers, and events that are out of order or not within the training."""
        found = [f"resampling.{r}" for r in (*whole(rows=self.rows), *positive(encoder_scale=self.encoder_scale))]
        if not self.at:
            found.append("resampling.at has no event: leave resampling out")
        if list(self.at) != sorted(set(self.at)) or not all(0 <= share < 1 for share in self.at):
            found.append(
                "resampling.at must be shares of the steps, at least 0 and below 1, in ascending order, unlike "
                f"{', '.join(map(str, self.at))}"
            )
        return found

    def steps_left(self, step: int, steps: int, batch_rows: int) -> int | None:
        """Batches of the event under way that are left, this one included; None where there is no event."""
        starts = [int(share * steps) for share in self.at]
        for start, following in zip(starts, [*starts[1:], steps], strict=True):
            length = max(1, min(self.rows // batch_rows, (following - start) // 2))
            if start <= step < start + length:
                return start + length - step
        return None


@torch.no_grad()
def resample(trainer: "DictionaryTrainer", plan: Resampling, left: int, x: Tensor, residual: Tensor) -> Tensor:
    """Revive a part of the dead latents from this batch's rows, so that none is left after `left` such batches.

    `x` [rows, d_in] normalised inputs, `residual` [rows, d_out] their errors. Returns which, among all blocks' latents.
    """
    model, dead = trainer.dictionary, trainer.dead()
    generator = torch.Generator().manual_seed(_seed(trainer.config.seed, trainer.step_number))
    revived = []
    for number, block in enumerate(model.each_block()):
        first = number * model.config.latents
        of_block = dead[first : first + model.config.latents]
        candidates = of_block.nonzero().squeeze(1)
        if trainer.anchors is not None:
            candidates = candidates[candidates >= trainer.anchors.count]
        latents = candidates[: -(-len(candidates) // left)]
        weights = residual[:, block.shape.writes].square().sum(1).double().square().cpu()
        if len(latents) == 0 or not bool(weights.sum() > 0):
            continue
        # Without replacement it would draw rows of weight zero, which no latent can begin at, when others run out.
        again = len(latents) > min(len(x) // 2, int((weights > 0).sum()))
        rows = torch.multinomial(weights, len(latents), replacement=again, generator=generator).to(x.device)
        read = functional.normalize(x[rows][:, block.shape.reads], dim=1)
        # An autoencoder's decoder writes the input itself; any other the part of the output that is missing.
        written = read if model.config.is_autoencoder and not model.config.cross_layer else residual[rows]
        written = functional.normalize(written if written is read else written[:, block.shape.writes], dim=1)
        alive = torch.linalg.vector_norm(block.W_enc[~of_block], dim=1)
        norm = alive.mean() if len(alive) else 1.0
        decoder_norm = torch.linalg.vector_norm(block.W_dec[~of_block], dim=1)
        block.W_enc[latents] = read * norm * plan.encoder_scale
        block.W_dec[latents] = written * (decoder_norm.mean() if len(decoder_norm) else 1.0)
        block.b_enc[latents] = 0
        for name in block.activation.trained:
            block.own(name)[latents] = block.activation.own_weights(1)[name].to(x.device)
        for parameter in block.parameters():
            moments = trainer.optimizer.state[parameter]
            moments["exp_avg"][latents] = 0
            # One number, not one for each column: copies of a shared decoder have to move alike.
            moments["exp_avg_sq"][latents] = moments["exp_avg_sq"][~of_block].mean() if len(alive) else 0.0
        revived.append(first + latents)
    model.tie_shared()
    return torch.cat(revived) if revived else dead.new_empty(0, dtype=torch.int64)


def _seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63
