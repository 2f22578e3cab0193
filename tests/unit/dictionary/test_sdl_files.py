"""Saved dictionaries: every variant comes back as it was; what is damaged, or of another model or site, is refused."""

import json
from pathlib import Path

import pytest
import torch
from formulas import ACTIVATIONS, ROWS, VARIANTS, config_of, randn, random_dictionary
from safetensors.torch import load, save

from pipeline.errors import InputError
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.files import FORMAT, JSON, WEIGHTS, load_dictionary, save_dictionary

MODELS = {"models": {"base": {"id": "org/Base-1B"}, "tuned": {"id": "org/Tuned-1B"}}}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def transcoder() -> Dictionary:
    return random_dictionary(VARIANTS["transcoder"]).float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_as_it_was(tmp_path: Path, variant: str, activation: str) -> None:
    dictionary = random_dictionary(config_of(variant, activation)).float()
    if activation == "batch_topk":
        for number, block in enumerate(dictionary.each_block()):
            block.own("threshold").fill_(0.25 + number)
    loaded = load_dictionary(write(tmp_path, save_dictionary(dictionary, {"harvest": "abc"})))
    assert loaded.config == dictionary.config
    assert json.loads((tmp_path / JSON).read_text())["harvest"] == "abc"
    assert loaded.state_dict().keys() == dictionary.state_dict().keys()
    for name, weight in dictionary.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert not any(p.requires_grad for p in loaded.parameters())
    x = randn(ROWS, dictionary.config.d_in)
    assert torch.equal(loaded(x), dictionary(x).detach())
    assert save_dictionary(loaded, {"harvest": "abc"}) == save_dictionary(dictionary, {"harvest": "abc"})


def test_it_is_found_under_a_url(tmp_path: Path, transcoder: Dictionary) -> None:
    write(tmp_path, save_dictionary(transcoder, {}))
    assert load_dictionary(f"file://{tmp_path}").config == transcoder.config
    with pytest.raises(InputError, match="no dictionary in file://"):
        load_dictionary(f"file://{tmp_path}/elsewhere")


def test_no_dictionary_there(tmp_path: Path, transcoder: Dictionary) -> None:
    with pytest.raises(InputError, match="no dictionary in"):
        load_dictionary(tmp_path)
    write(tmp_path, save_dictionary(transcoder, {}))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no dictionary in"):
        load_dictionary(tmp_path)


def changed(about: dict[str, object]) -> bytes:
    record = json.loads(save_dictionary(random_dictionary(VARIANTS["transcoder"]).float(), {})[JSON])
    record["config"] |= about
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (JSON, b"{"),
        (JSON, b"[]"),
        (JSON, f'{{"format": {FORMAT + 1}}}'.encode()),
        (JSON, f'{{"format": {FORMAT}}}'.encode()),
        (JSON, changed({"latents": 13})),
        (JSON, changed({"latents": 2})),
        (JSON, changed({"surplus": 1})),
        (JSON, changed({"activation": {"kind": "softmax"}})),
        (JSON, changed({"activation": {"kind": "topk", "kk": 3}})),
        (JSON, save_dictionary(random_dictionary(VARIANTS["transcoder"]).float(), {"models": None})[JSON]),
        (WEIGHTS, b"cut"),
        (WEIGHTS, save({"blocks.0.W_enc": torch.zeros(1, 1)})),
    ],
    ids=lambda content: content.decode("latin1")[-40:] if isinstance(content, bytes) else "",
)
def test_a_damaged_dictionary_is_an_input_error(
    tmp_path: Path, transcoder: Dictionary, file: str, content: bytes
) -> None:
    write(tmp_path, {**save_dictionary(transcoder, {}), file: content})
    with pytest.raises(InputError, match=str(tmp_path)):
        load_dictionary(tmp_path)


def test_weights_are_safetensors(transcoder: Dictionary) -> None:
    files = save_dictionary(transcoder, {})
    assert files.keys() == {JSON, WEIGHTS}
    assert torch.equal(load(files[WEIGHTS])["blocks.0.W_enc"], transcoder.W_enc)


# ---- for what it is wanted


def test_a_dictionary_of_another_model_is_refused_with_both_names(tmp_path: Path, transcoder: Dictionary) -> None:
    write(tmp_path, save_dictionary(transcoder, {"models": {"base": {"id": "org/Base-1B"}}}))
    assert load_dictionary(tmp_path, model="org/Base-1B").config == load_dictionary(tmp_path, model="base").config
    with pytest.raises(InputError, match=r"is of the model base or org/Base-1B, and it is wanted for org/Other"):
        load_dictionary(tmp_path, model="org/Other")


def test_a_dictionary_of_two_models_is_one_of_each(tmp_path: Path, transcoder: Dictionary) -> None:
    write(tmp_path, save_dictionary(transcoder, MODELS))
    for name in ("base", "tuned", "org/Base-1B", "org/Tuned-1B"):
        load_dictionary(tmp_path, model=name)


def test_a_dictionary_that_does_not_say_its_model_is_refused_for_one(tmp_path: Path, transcoder: Dictionary) -> None:
    write(tmp_path, save_dictionary(transcoder, {}))
    with pytest.raises(InputError, match=r"is of the model \(unknown\), and it is wanted for base"):
        load_dictionary(tmp_path, model="base")


def test_a_dictionary_of_other_sites_is_refused_with_both_names(tmp_path: Path, transcoder: Dictionary) -> None:
    write(tmp_path, save_dictionary(transcoder, {}))
    load_dictionary(tmp_path, input=["mlp_in.1"])
    with pytest.raises(InputError, match=r"reads mlp_in\.1, and it is wanted for mlp_in\.2"):
        load_dictionary(tmp_path, input=["mlp_in.2"])
    with pytest.raises(InputError, match=r"reads mlp_in\.1, and it is wanted for mlp_in\.1, mlp_in\.2"):
        load_dictionary(tmp_path, input=["mlp_in.1", "mlp_in.2"])


def test_a_dictionary_that_writes_other_sites_is_refused(tmp_path: Path, transcoder: Dictionary) -> None:
    write(tmp_path, save_dictionary(transcoder, {}))
    load_dictionary(tmp_path, input=["mlp_in.1"], output=["mlp_out.1"])
    load_dictionary(tmp_path, input="mlp_in.1", output="mlp_out.1")
    with pytest.raises(InputError, match=r"writes mlp_out\.1, and it is wanted for mlp_in\.1"):
        load_dictionary(tmp_path, output=["mlp_in.1"])
