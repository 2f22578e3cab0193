"""A dictionary: encoder from the input sites, sparsifying activation, decoder to the output sites.

    z = sigma(W_enc x + b_enc),   y = W_dec^T z + b_dec        (arXiv 2512.05534, definition 2.5)

One class covers SAEs (output = input) and transcoders (output = another site); choosing a variant is choosing sites.
`x` and `y` are activations as stored: whatever normalisation the training used is folded into the weights when a
dictionary is saved, so that nothing can be lost between harvest and use.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.errors import InputError

FORMAT = 1
ACTIVATION = "topk"


@dataclass(frozen=True)
class DictionaryConfig:
    """The shape of a dictionary."""

    input: tuple[str, ...]
    """Sites whose activations, side by side, are encoded."""
    output: tuple[str, ...]
    """Sites that are reconstructed; equal to `input` for an SAE."""
    d_in: int
    d_out: int
    latents: int
    k: int
    """Latents that may be active at once (TopK; Gao et al. 2024, arXiv 2406.04093)."""

    def __post_init__(self) -> None:
        if not 0 < self.k <= self.latents:
            raise InputError(f"activation.k must be between 1 and latents = {self.latents}, not {self.k}")

    @property
    def is_autoencoder(self) -> bool:
        return self.input == self.output


class Dictionary(nn.Module):
    """The weights: W_enc [latents, d_in], b_enc [latents], W_dec [latents, d_out], b_dec [d_out], all float32."""

    def __init__(self, config: DictionaryConfig):
        super().__init__()
        self.config = config
        self.W_enc = nn.Parameter(torch.zeros(config.latents, config.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.latents))
        self.W_dec = nn.Parameter(torch.zeros(config.latents, config.d_out))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))

    def initialise(self, seed: int) -> None:
        """Random unit decoder rows; the encoder is the decoder's transpose for an SAE, else its own random rows."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.W_dec.copy_(nn.functional.normalize(torch.randn(self.W_dec.shape, generator=generator), dim=1))
            if self.config.is_autoencoder:
                self.W_enc.copy_(self.W_dec)
            else:
                self.W_enc.copy_(nn.functional.normalize(torch.randn(self.W_enc.shape, generator=generator), dim=1))

    def preactivations(self, x: Tensor) -> Tensor:
        """W_enc x + b_enc for x [rows, d_in] -> [rows, latents]."""
        return nn.functional.linear(x, self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """The code z of x [rows, d_in] -> [rows, latents]: the k largest preactivations, those below zero set to 0."""
        return top_k(self.preactivations(x.to(self.W_enc.dtype)), self.config.k)

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction of z [rows, latents] -> [rows, d_out]."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def folded(self, x_norm: "Normalisation", y_norm: "Normalisation") -> "Dictionary":
        """Return the dictionary on raw activations that equals this one on normalised ones; codes are the same."""
        raw = Dictionary(self.config).to(self.W_enc.device)
        raw.W_enc.copy_(self.W_enc * x_norm.scale)
        raw.b_enc.copy_(self.b_enc - raw.W_enc @ x_norm.mean)
        raw.W_dec.copy_(self.W_dec / y_norm.scale)
        raw.b_dec.copy_(self.b_dec / y_norm.scale + y_norm.mean)
        return raw


@dataclass(frozen=True)
class Normalisation:
    """x -> (x - mean) * scale, with scale chosen so that E||x||^2 = d after centring."""

    mean: Tensor
    """float32 [d]."""
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) * self.scale

    def to(self, device: torch.device | str) -> "Normalisation":
        return Normalisation(self.mean.to(device), self.scale)


def top_k(preactivations: Tensor, k: int) -> Tensor:
    """Keep the k largest entries of each row where they are positive; zero elsewhere. Gradients flow to the kept."""
    values, index = preactivations.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(preactivations).scatter(-1, index, values.relu())


def save_dictionary(dictionary: Dictionary, about: dict[str, Any]) -> dict[str, bytes]:
    """Encode a dictionary as files: name -> content. `about` (model and store digests, metrics) goes into the JSON."""
    weights = {name: parameter.detach().contiguous() for name, parameter in dictionary.named_parameters()}
    record = {"format": FORMAT, "activation": ACTIVATION, "config": asdict(dictionary.config), **about}
    return {
        "dictionary.safetensors": save(weights),
        "dictionary.json": (json.dumps(record, indent=2) + "\n").encode(),
    }


def load_dictionary(folder: str | Path) -> Dictionary:
    """Load a dictionary from the folder or URL it was saved in (`<store>/runs/<name>`). Raises InputError."""

    def read(name: str) -> bytes:
        if "://" not in str(folder):
            return (Path(folder).expanduser() / name).read_bytes()
        import fsspec  # not on every machine that only computes

        with fsspec.open(f"{folder}/{name}", "rb") as file:
            content: bytes = file.read()
        return content

    try:
        record = json.loads(read("dictionary.json"))
        weights = load(read("dictionary.safetensors"))
        found = (record["format"], record["activation"])
        if found != (FORMAT, ACTIVATION):
            raise InputError(f"the dictionary in {folder} is {found}; this version reads {(FORMAT, ACTIVATION)}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}
        dictionary = Dictionary(DictionaryConfig(**fields))
        dictionary.load_state_dict(weights)
    except FileNotFoundError as error:
        raise InputError(f"no dictionary in {folder}: {error.filename or error} is not there; train it first") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        raise InputError(f"the dictionary in {folder} is damaged: {error}") from None
    return dictionary.eval().requires_grad_(False)
