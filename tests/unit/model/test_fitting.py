"""Weights that do not fit their config, or are none: refused when planning, with file, tensor and shapes."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import FakeHub
from lab import TRAIN, Lab, RayStarted
from safetensors.torch import load_file, save_file

from jobs.cli.main import main
from pipeline.checkpoints import tensors_in_files
from pipeline.checkpoints.tensors_in_files import tensor_entries
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.load import check_weights, load_base_model

Tensors = dict[str, torch.Tensor]
FORMS = ["safetensors", "safetensors in two", "torch", "torch in two", "old torch"]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4865522496\n"
PAGE = "<!-- saved -->\n<!DOCTYPE html>\n<html><head><title>401</title></head></html>"
INSTEAD = {
    "pointer": (LFS, "is a git-lfs pointer, which stands for the file and is not the file; run `git lfs pull` in "),
    "annex": ("/annex/objects/MD5E-s1--5f.bin\n", "is a git-annex pointer.*; run `git annex get .` in "),
    "page": (PAGE, "is an HTML page that was saved in its place; download it again, by the address of the file"),
    "xml": ('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', r"is what a server said in place of the"),
    "json": ('{"error":"Repository not found"}', r"is what a server said in place of the file \(\{\"error\""),
    "words": ("Entry not found", r"is what a server said in place of the file \(Entry not found\); download it again"),
    "empty": ("", "is empty; download it again"),
    "zeros": ("\0" * 5000, "is filled with zeros, as an interrupted copy leaves it; download it again"),
}


def write(folder: Path, tensors: Tensors, form: str) -> list[Path]:
    """Put tensors into a model's folder in place of its weights; return the files."""
    for old in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        old.unlink()
    ending = "safetensors" if form.startswith("safetensors") else "bin"
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = [f"{stem}.{ending}"]
    if form.endswith("two"):
        names = [f"{stem}-0000{number}-of-00002.{ending}" for number in (1, 2)]
        where = {name: names["layers.1" in name] for name in tensors}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for number, name in enumerate(names):
        part = {key: t for key, t in tensors.items() if len(names) == 1 or ("layers.1" in key) == number}
        if ending == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=form != "old torch")
    return [folder / name for name in names]


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.mark.parametrize("form", FORMS)
def test_the_tensor_that_does_not_fit_is_named(folder: Path, form: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    odd = "model.layers.1.mlp.down_proj.weight"
    *_, last = write(folder, {**tensors, odd: doubled(tensors[odd])}, form)
    info = describe_model(str(folder))
    check_weights(info, 1)  # what is not loaded need not fit
    message = (
        rf"the weights of .* cannot be loaded: {odd} in {last.name} has the shape \[64, 48\], and config.json asks "
        r"for \[32, 48\]; download the checkpoint again, or give it the config.json that it was saved with"
    )
    for check in (lambda: check_weights(info, 2), lambda: load_base_model(info, layers=2, dtype="float32")):
        with pytest.raises(InputError, match=message):
            check()


@pytest.mark.parametrize("form", FORMS)
def test_whole_weights_are_accepted_in_every_form(folder: Path, form: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    write(folder, tensors, form)
    info = describe_model(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_weights(info, info.num_layers)
        found = tensor_entries(folder)
    assert found is not None
    assert {name: entry.shape for name, entry in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    write(folder, tensors, form)
    with pytest.raises(InputError, match=r"a tensor .* is not there \(layers\.2\.self_attn\.o_proj\.weight\)"):
        check_weights(describe_model(str(folder)), 3)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("vocab_size", 400, r"embed_tokens.weight in model.safetensors has the shape \[328, 32\], .* for \[400, 32\];"),
        ("intermediate_size", 64, r"has the shape \[32, 48\], and config.json asks for \[32, 64\] \(9 tensors do not"),
        ("num_key_value_heads", 4, r"k_proj.weight in model.safetensors has the shape \[16, 32\], .* for \[32, 32\]"),
        ("hidden_size", 64, r"\[328, 32\], and config.json asks for \[328, 64\] \(\d+ tensors do not fit"),
    ],
)
def test_a_config_of_another_model(folder: Path, key: str, value: int, expected: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=expected):
        check_weights(describe_model(str(folder)), 3)


@pytest.mark.parametrize(("family", "part"), [("mixtral", "w1"), ("qwen3_moe", "gate_proj"), ("olmoe", "down_proj")])
def test_an_expert_that_is_unlike_the_others(
    make_model: Callable[..., Path], tmp_path: Path, family: str, part: str
) -> None:
    """transformers puts experts together, and says only that it could not."""
    folder = Path(shutil.copytree(make_model(family), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    odd = next(name for name in sorted(tensors) if "experts.2." in name and f"{part}." in name)
    write(folder, {**tensors, odd: doubled(tensors[odd])}, "safetensors")
    with pytest.raises(InputError, match=rf"{odd} in model.safetensors has the shape .* others of its kind have"):
        check_weights(describe_model(str(folder)), 3)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2"])
def test_what_transformers_accepts_goes_on(make_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Tied embeddings, with and without a head of their own; more tensors than the model has; names without prefix."""
    folder = Path(shutil.copytree(make_model(family, tie_word_embeddings=True), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    more = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "value_head.bias": torch.ones(1)}
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for form in ("safetensors", "torch"):
        for given in (tensors, more, bare):
            write(folder, given, form)
            check_weights(describe_model(str(folder)), 3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gemma3_text"])
def test_what_an_evaluation_needs_besides(make_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """The layers behind the last site, and the head: a run would learn of them after its training."""
    folder = Path(shutil.copytree(make_model(family, tie_word_embeddings=False), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    check_weights(describe_model(str(folder)), 3, with_head=True)
    last = next(name for name in tensors if "layers.2." in name and name.endswith("q_proj.weight"))
    for name, expected in (("lm_head.weight", r"asks for is not there \(lm_head"), (last, "is not there .*layers.2")):
        write(folder, {key: tensor for key, tensor in tensors.items() if key != name}, "safetensors")
        info = describe_model(str(folder))
        check_weights(info, 2)
        with pytest.raises(InputError, match=expected):
            check_weights(info, 3, with_head=True)
    tied = Path(shutil.copytree(make_model(family, tie_word_embeddings=True), tmp_path / "tied"))
    check_weights(describe_model(str(tied)), 3, with_head=True)


@pytest.mark.parametrize("command", ["run", "harvest"])
def test_a_run_that_evaluates_learns_of_it_first(lab: Lab, llama: Path, no_ray: None, command: str) -> None:
    folder = Path(shutil.copytree(llama, lab.folder / "model"))
    tensors = load_file(folder / "model.safetensors")
    write(folder, {**tensors, "lm_head.weight": doubled(tensors["lm_head.weight"])}, "safetensors")
    spec = lab.spec({"model.id": "model", "train": TRAIN, "corpus.holdout": 0.1})
    if command == "run":
        assert "lm_head.weight in model.safetensors has the shape [656, 32], and config.json asks for [328, 32]" in (
            lab.refused("run", spec)
        )
        return
    with pytest.raises(RayStarted):  # a harvest needs no head
        main(["harvest", str(spec)])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00002-of-00002.bin"])
@pytest.mark.parametrize("instead", INSTEAD)
def test_what_is_in_the_place_of_weights_is_said(lab: Lab, llama: Path, no_ray: None, name: str, instead: str) -> None:
    folder = Path(shutil.copytree(llama, lab.folder / "model"))
    form = {"model.safetensors": "safetensors", "pytorch_model.bin": "torch"}.get(name, "torch in two")
    write(folder, load_file(folder / "model.safetensors"), form)
    content, expected = INSTEAD[instead]
    (folder / name).write_text(content)
    for verb in ("plan", "harvest"):
        err = lab.refused(verb, lab.spec({"model.id": "model"}))
        assert re.search(rf"the weights of {folder} cannot be loaded: {name} {expected}", err), err


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_what_is_in_the_place_of_an_index(folder: Path, index: str) -> None:
    write(folder, load_file(folder / "model.safetensors"), f"{'safetensors' if 'safe' in index else 'torch'} in two")
    (folder / index).write_text(LFS)
    with pytest.raises(InputError, match=rf"{index} is a git-lfs pointer, .*; run `git lfs pull` in {folder}"):
        describe_model(str(folder))
    files = [path.name for path in folder.glob("*-of-00002.*")]
    (folder / index).write_text(json.dumps({"weight_map": dict(zip("ab", files, strict=True))}))
    with pytest.raises(InputError, match=rf"{index} has no `metadata`, without which transformers does not read it"):
        describe_model(str(folder))
    (folder / index).write_text("[1]")
    with pytest.raises(InputError, match=rf"{index} is not an index of weight files"):
        describe_model(str(folder))


@pytest.mark.parametrize("form", ["torch", "old torch"])
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.9, -1])
def test_cut_files_of_torch_are_refused(folder: Path, form: str, kept: float) -> None:
    (file,) = write(folder, load_file(folder / "model.safetensors"), form)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept) if kept < 0 else int(len(whole) * kept)])
    with pytest.raises(InputError, match=r"pytorch_model\.bin is damaged, or no file of weights \(.*download it again"):
        check_weights(describe_model(str(folder)), 1)


def test_other_things_that_torch_saved(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    for content, expected in (
        ([torch.ones(2)], "holds a list, and should hold tensors by their names"),
        (torch.ones(2), "holds a Tensor, and should hold tensors by their names"),
        ({"model": {"a": torch.ones(2)}}, r"\d+ tensors that its config.json asks for are not there"),
        ({"model": Path("x")}, "is damaged, or no file of weights .torch.save did not write it, or it holds objects"),
    ):
        torch.save(content, file)
        with pytest.raises(InputError, match=expected):
            check_weights(describe_model(str(folder)), 1)


def test_a_header_that_contradicts_itself(folder: Path) -> None:
    """Shapes that need other bytes than are there."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    file.write_bytes(raw.replace(header, header.replace(b'"shape":[32,48]', b'"shape":[32,49]', 1)))
    with pytest.raises(InputError, match=r"model\.safetensors is damaged, or no file of weights"):
        check_weights(describe_model(str(folder)), 3)


def test_a_large_old_file_of_torch_is_not_read_for_its_description(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = write(folder, load_file(folder / "model.safetensors"), "old torch")
    info = describe_model(str(folder))
    monkeypatch.setattr(tensors_in_files, "READ_WHOLE_BYTES", file.stat().st_size - 1)
    assert tensor_entries(folder) is None
    check_weights(info, 3)
    monkeypatch.setattr(tensors_in_files, "READ_WHOLE_BYTES", file.stat().st_size)
    assert tensor_entries(folder) is not None


def test_files_that_are_not_loaded_may_be_anything(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text(LFS)
    check_weights(describe_model(str(folder)), 3)


@pytest.mark.parametrize("instead", ["pointer", "page", "words"])
def test_a_snapshot_of_the_hub_with_junk(hub: FakeHub, folder: Path, instead: str) -> None:
    content, expected = INSTEAD[instead]
    (folder / "model.safetensors").write_text(content)
    hub.add("a/junk", folder)
    info = describe_model("a/junk")
    for check in (lambda: check_weights(info, 1), lambda: load_base_model(info, layers=1, dtype="float32")):
        with pytest.raises(InputError, match=rf"model\.safetensors {expected}"):
            check()


def test_shapes_of_a_snapshot_of_the_hub(hub: FakeHub, inputs: Path) -> None:
    hub.add("a/doubled", inputs / "weights-of-another-shape")
    info = describe_model("a/doubled")
    with pytest.raises(InputError, match=r"has the shape \[\d+(, \d+)?\], and config.json asks for"):
        check_weights(info, 2)


def test_quantised_weights_are_left_to_transformers(folder: Path) -> None:
    """Whose shapes are not those of the model; junk in their place is told all the same."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    write(folder, {name: doubled(t) for name, t in load_file(folder / "model.safetensors").items()}, "torch")
    check_weights(describe_model(str(folder)), 3)
    (folder / "pytorch_model.bin").write_text(LFS)
    with pytest.raises(InputError, match="is a git-lfs pointer"):
        check_weights(describe_model(str(folder)), 3)
