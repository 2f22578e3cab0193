"""Small files of a model and its tokenizer in whose place something else was saved, or revisions that do nothing."""

import json
import shutil
from pathlib import Path

import pytest
from hub import FakeHub
from lab import Lab

from pipeline.checkpoints.downloads import page_or_pointer, stand_in
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.tokens.tokenizer import load_tokenizer

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4865522496\n"
PAGE = "\ufeff<!DOCTYPE HTML>\n<html><head><title>Sign in</title></head></html>"
INSTEAD = {
    LFS: "is a git-lfs pointer, which stands for the file and is not the file; run `git lfs pull` in ",
    PAGE: "is an HTML page that was saved in its place; download it again, by the address of the file itself",
    "": "is empty; download it again",
    '{"error": "Access to model a/b is restricted"}': "is what a server said in place of the file",
}


@pytest.mark.parametrize("instead", INSTEAD, ids=["pointer", "page", "empty", "error"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_files_that_were_not_downloaded(lab: Lab, llama: Path, no_ray: None, name: str, instead: str) -> None:
    folder = Path(shutil.copytree(llama, lab.folder / "model"))
    (folder / name).write_text(instead)
    for verb in ("plan", "harvest", "run"):
        err = lab.refused(verb, lab.spec({"model.id": "model"}))
        assert f"{folder}" in err
        assert f"its {name} {INSTEAD[instead]}" in err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_of_a_snapshot_that_were_not_downloaded(hub: FakeHub, llama: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / name).write_text(PAGE)
    hub.add("a/junk", folder)
    load = describe_model if name == "config.json" else load_tokenizer
    with pytest.raises(InputError, match=f"its {name} is an HTML page"):
        load("a/junk")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
@pytest.mark.parametrize("instead", [LFS, PAGE, "<html>no</html>"])
def test_a_chat_template_that_was_not_downloaded(lab: Lab, llama: Path, no_ray: None, name: str, instead: str) -> None:
    """Any text is a template, and every chat would be this one."""
    folder = Path(shutil.copytree(llama, lab.folder / "model"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(instead)
    (lab.folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a b"}]}\n' * 9)
    chats = {"corpus.path": "chats.jsonl", "corpus.messages": "messages", "corpus.labels": []}
    for verb in ("plan", "harvest"):
        err = lab.refused(verb, lab.spec({"model.id": "model", **chats}))
        assert f"corpus.messages: the chat template of {folder} is " in err
        assert ("git lfs pull" if instead == LFS else "an HTML page") in err
    assert "rows" in lab.run("plan", lab.spec({"model.id": "model"}))  # texts need no template


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json", "README.md"])
def test_files_that_nothing_is_taken_from_may_be_anything(lab: Lab, llama: Path, name: str) -> None:
    folder = Path(shutil.copytree(llama, lab.folder / "model"))
    plain = json.loads(lab.run("plan", lab.spec({"model.id": "model"}), "--json"))
    (folder / name).write_text(LFS)
    assert json.loads(lab.run("plan", lab.spec({"model.id": "model"}), "--json")) == plain


@pytest.mark.parametrize(
    "content",
    [
        b'{"model_type": "llama"}',
        b'{"version": "1.0", "added_tokens": []}',
        b"#version: 0.2\nh e\n",
        b"{% for m in messages %}{{ m.content }}{% endfor %}",
        b"<|im_start|>{{ messages[0].content }}",
        b"<message>{{ messages[0].content }}</message>",
        b"\x08\x00\x00\x00\x00\x00\x00\x00{}",
        b"\x80\x02\x8a\x0al\xfc\x9c",
        b"PK\x03\x04",
        b"version 3",
    ],
)
def test_what_is_its_own_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    text = content.decode("latin-1")
    assert page_or_pointer(text, str(tmp_path)) is None
    assert text.startswith("<message") or stand_in(tmp_path / "file") is None


# ---- revisions of folders


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.revision": "step1000"}, "model.revision: step1000 has no effect, as {llama} is a folder, which is"),
        (
            {"model.tokenizer": "{llama}", "model.tokenizer_revision": "v2"},
            "model.tokenizer_revision: v2 has no effect, as {llama} is a folder",
        ),
        (
            {"model.tokenizer": "{llama}", "model.tokenizer_revision": "main"},
            "model.tokenizer_revision: main has no effect, as {llama} is a folder",
        ),
    ],
)
def test_the_revision_of_a_folder(lab: Lab, llama: Path, no_ray: None, changes: dict[str, str], expected: str) -> None:
    given = {key: value.replace("{llama}", str(llama)) for key, value in changes.items()}
    for verb in ("plan", "harvest", "run"):
        err = lab.refused(verb, lab.spec(given))
        assert expected.replace("{llama}", str(llama)) in err
        assert "leave the key out, and give the folder that has what is wanted, or a name on the hub" in err


def test_the_default_revision_of_a_folder_may_be_written_out(lab: Lab) -> None:
    assert "rows" in lab.run("plan", lab.spec({"model.revision": "main"}))
