"""Dead latents begin anew at inputs that are reconstructed badly (Bricken et al. 2023, appendix "neuron resampling").

At some shares of the training, inputs are drawn with probability proportional to their squared loss; each dead latent
gets one: its decoder row that input's direction, its encoder row the same at 0.2 of the mean norm of the alive encoder
rows, bias zero. Its momentum is zero, its second moments are the alive latents' mean: were they zero too, Adam would
move it by some 30 learning rates whenever one of its few inputs comes, away from where it was put, and it would die
again. An event lasts over several batches, and each revives its part of what is still dead, so that latents are drawn
from many rows without any being kept: the state stays what a checkpoint holds. Anchored latents are left alone.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.sdl.dictionary.dictionary import Dictionary


@torch.no_grad()
def resample(
    dictionary: Dictionary,
    optimizer: torch.optim.Optimizer,
    dead: Tensor,
    x: Tensor,
    residual: Tensor,
    *,
    kept: int,
    batches_left: int,
    encoder_scale: float,
    seed: int,
) -> Tensor:
    """Revive a part of the dead latents from one batch's rows, so that none is left after `batches_left` batches.

    `dead` bool [latents of all blocks]; `x` [rows, d_in] normalised inputs, `residual` [rows, d_out] their errors. The
    first `kept` latents of each block are left alone: they have anchors. `encoder_scale`: the norm of a new encoder
    row, in mean norms of the alive ones. Return the numbers of those revived, int64, among all blocks' latents.
    """
    generator = torch.Generator().manual_seed(seed)
    revived = []
    for number, block in enumerate(dictionary.each_block()):
        first = number * dictionary.config.latents
        of_block = dead[first : first + dictionary.config.latents]
        candidates = of_block.nonzero().squeeze(1)
        candidates = candidates[candidates >= kept]
        latents = candidates[: -(-len(candidates) // batches_left)]
        weights = residual[:, block.shape.writes].square().sum(1).double().square().cpu()
        if len(latents) == 0 or not bool(weights.sum() > 0):
            continue
        # Without replacement it would draw rows of weight zero, which no latent can begin at, when others run out.
        again = len(latents) > min(len(x) // 2, int((weights > 0).sum()))
        rows = torch.multinomial(weights, len(latents), replacement=again, generator=generator).to(x.device)
        read = functional.normalize(x[rows][:, block.shape.reads], dim=1)
        # An autoencoder's decoder writes the input itself; any other the part of the output that is missing.
        written = read if dictionary.config.is_autoencoder and not dictionary.config.cross_layer else residual[rows]
        written = functional.normalize(written if written is read else written[:, block.shape.writes], dim=1)
        alive = torch.linalg.vector_norm(block.W_enc[~of_block], dim=1)
        norm = alive.mean() if len(alive) else 1.0
        decoder_norm = torch.linalg.vector_norm(block.W_dec[~of_block], dim=1)
        block.W_enc[latents] = read * norm * encoder_scale
        block.W_dec[latents] = written * (decoder_norm.mean() if len(decoder_norm) else 1.0)
        block.b_enc[latents] = 0
        for name in block.activation.trained:
            block.own(name)[latents] = block.activation.own_weights(1)[name].to(x.device)
        for parameter in block.parameters():
            moments = optimizer.state[parameter]
            moments["exp_avg"][latents] = 0
            # One number, not one for each column: copies of a shared decoder have to move alike.
            moments["exp_avg_sq"][latents] = moments["exp_avg_sq"][~of_block].mean() if len(alive) else 0.0
        revived.append(first + latents)
    dictionary.tie_shared()
    return torch.cat(revived) if revived else dead.new_empty(0, dtype=torch.int64)
