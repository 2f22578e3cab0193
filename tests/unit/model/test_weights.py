"""The fingerprint of a checkpoint: which edits it sees, which it cannot, and files that are not whole."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoints.weights import END_BYTES, SAMPLED_BLOCKS, WHOLE_TENSOR_BYTES, hash_weights
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.load import check_weights, load_base_model

MIB = 2**20
SMALL = [f"layers.{i}.norm" for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """72 MB: two large tensors and forty small ones between them; blocks are sampled every 300 kB."""
    rng = np.random.default_rng(0)
    tensors = {"a_large": rng.integers(0, 256, 40 * MIB, dtype=np.uint8)}
    tensors |= {name: rng.integers(0, 256, WHOLE_TENSOR_BYTES - i, dtype=np.uint8) for i, name in enumerate(SMALL)}
    tensors |= {"z_large": rng.integers(0, 256, 30 * MIB, dtype=np.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def fingerprint(folder: Path) -> str:
    sha = hashlib.sha256()
    hash_weights(folder, sha)
    return sha.hexdigest()


def place_of(folder: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes are in the file."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


def flip(folder: Path, offset: int) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_one_bit_of_any_small_tensor_is_seen(folder: Path) -> None:
    before, rng = fingerprint(folder), np.random.default_rng(1)
    for name in SMALL:
        offset = int(rng.integers(*place_of(folder, name)))
        flip(folder, offset)
        assert fingerprint(folder) != before, name
        flip(folder, offset)
    assert fingerprint(folder) == before


@pytest.mark.parametrize("name", ["a_large", "z_large"])
def test_the_ends_of_large_tensors_are_seen(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    start, stop = place_of(folder, name)
    for offset in (start, start + END_BYTES - 1, stop - END_BYTES, stop - 1):
        flip(folder, offset)
        assert fingerprint(folder) != before
        flip(folder, offset)


def test_what_it_cannot_see_is_one_entry_of_a_large_matrix(folder: Path) -> None:
    """The limit that the docstring states: if this fails, the fingerprint sees more, and should say so."""
    before = fingerprint(folder)
    size = (folder / "model.safetensors").stat().st_size
    between = size * 100 // SAMPLED_BLOCKS + 200_000  # after the hundredth sampled block, before the next
    assert place_of(folder, "a_large")[0] < between < place_of(folder, "a_large")[1]
    flip(folder, between)
    assert fingerprint(folder) == before


def test_a_tensor_that_is_trained_further_or_exchanged_is_seen(folder: Path) -> None:
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("a_large", SMALL[0]):
        save_file({**tensors, name: tensors[name] ^ 1}, folder / "model.safetensors")
        assert fingerprint(folder) != before
    swapped = {**tensors, SMALL[0]: tensors[SMALL[1]], SMALL[1]: tensors[SMALL[0]]}
    save_file(swapped, folder / "model.safetensors")
    assert fingerprint(folder) != before
    save_file({**{n: t for n, t in tensors.items() if n != SMALL[0]}, "other": tensors[SMALL[0]]}, folder / "x")
    (folder / "x").rename(folder / "model.safetensors")  # the same bytes under another name
    assert fingerprint(folder) != before
    save_file(tensors, folder / "model.safetensors")
    assert fingerprint(folder) == before


def test_a_copy_elsewhere_has_the_same_fingerprint(make_model: Callable[..., Path], tmp_path: Path) -> None:
    original = make_model("llama")
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert describe_model(str(tmp_path)).fingerprint == describe_model(str(original)).fingerprint
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert describe_model(str(tmp_path)).fingerprint != describe_model(str(original)).fingerprint


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 5000, -1])
def test_cut_files_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        InputError, match=r"model\.safetensors (has no safetensors header|is damaged|is empty).*download it again"
    ):
        fingerprint(folder)


def test_files_that_the_index_names_and_are_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    names = {f"t{i}": f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match=r"2 of the 3 files that .* names are missing, the first is model-00002"):
        fingerprint(folder)
    index.write_text('{"weight_map": 5}')
    with pytest.raises(InputError, match="is not an index of weight files"):
        fingerprint(folder)


def test_weights_that_are_replaced_after_the_model_was_described(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """As seen by a worker that begins later, or on a machine that has others at that path."""
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    info = describe_model(str(folder))
    load_base_model(info, layers=1, dtype="float32")
    shutil.copy(make_model("llama", seed=1) / "model.safetensors", folder)
    with pytest.raises(
        InputError, match=rf"has the fingerprint \w+, and this run began with {info.fingerprint}: the we"
    ):
        load_base_model(info, layers=1, dtype="float32")


@pytest.mark.parametrize("there", [(1,), (1, 2), (2,)])
def test_several_files_without_an_index(folder: Path, there: tuple[int, ...]) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for number in there:
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(whole)
    absent = {1, 2}.difference(there)
    also = f", and 1 of 2 files are missing, the first is model-0000{absent.pop()}-of-00002" if absent else "; download"
    with pytest.raises(InputError, match=f"neither model.safetensors nor model.safetensors.index.json, .* files{also}"):
        fingerprint(folder)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_tensors_that_are_missing_are_told_without_loading(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    for file in make_model(family).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info = describe_model(str(tmp_path))
    check_weights(info, info.num_layers)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in sorted(tensors) if "layers.1." in name and name.endswith("q_proj.weight"))
    save_file({name: t for name, t in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    check_weights(info, 1)  # what is not loaded may be missing
    message = r"a tensor .* is not there \(layers\.1\.self_attn\.q_proj\.weight\); download the checkpoint again"
    with pytest.raises(InputError, match=message):
        check_weights(info, 2)


@pytest.mark.parametrize(
    ("model_id", "expected"),
    [
        ("./modle", "there is no folder modle"),
        ("models/llama/8b", "there is no folder models/llama/8b"),
        ("../nowhere", "there is no folder ../nowhere"),
        ("{parent}/lama", "there is no folder .*/lama; did you mean llama?"),
    ],
)
def test_a_path_that_is_mistyped_is_taken_for_a_path(
    make_model: Callable[..., Path], model_id: str, expected: str
) -> None:
    with pytest.raises(InputError, match=expected.replace("?", r"\?").replace("..", r"\.\.")):
        describe_model(model_id.format(parent=make_model("llama").parent))
