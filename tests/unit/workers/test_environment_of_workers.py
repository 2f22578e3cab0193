"""Environment variables that are named in a spec or by --env: their values are nowhere but where they are used."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli.main import main
from jobs.spec.spec import SpecError, parse_spec
from pipeline.errors import InputError
from workers.cluster.environment import values_of

SECRET = "hf_s3cr3t-that-must-not-be-seen"


def raw_spec(**cluster: Any) -> dict[str, Any]:
    return {
        "store": "s",
        "model": {"id": "m"},
        "corpus": {"path": "c"},
        "harvest": {"sites": ["resid_post.0"]},
        "cluster": cluster,
    }


def test_values_are_those_of_the_environment() -> None:
    environment = {"HF_TOKEN": SECRET, "HF_HOME": "/data/hub", "OTHER": "x"}
    assert values_of(["HF_HOME", "HF_TOKEN", "HF_HOME"], environment) == {"HF_HOME": "/data/hub", "HF_TOKEN": SECRET}
    assert values_of([], environment) == {}


@pytest.mark.parametrize(
    ("names", "environment", "expected"),
    [
        (["HF_TOKEN"], {}, "HF_TOKEN is not set in the environment here"),
        (["HF_TOKEN", "HF_HOME"], {"HF_TOKEN": ""}, "HF_TOKEN is empty, HF_HOME is not set"),
        ([f"HF_TOKEN={SECRET}"], {}, r"give the name of a variable alone \(HF_TOKEN\)"),
        (["HF TOKEN"], {}, "expected names of environment variables"),
        (["RAY_ADDRESS"], {"RAY_ADDRESS": "x"}, "RAY_ADDRESS is Ray's own"),
        (["HF_TOKEN"], {"HF_TOKEN": f"$HOME{SECRET}"}, "the value of HF_TOKEN has a \\$"),
    ],
)
def test_what_cannot_go_along_is_refused_without_its_value(
    names: list[str], environment: dict[str, str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        values_of(names, environment)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "env", [f"HF_TOKEN={SECRET}", [f"HF_TOKEN={SECRET}"], {"HF_TOKEN": SECRET}, [{"HF_TOKEN": SECRET}], [[SECRET]]]
)
def test_a_value_in_a_spec_is_refused_and_not_shown(env: Any) -> None:
    with pytest.raises(SpecError, match=r"cluster\.env: ") as caught:
        parse_spec(raw_spec(env=env), Path("/"))
    assert SECRET not in str(caught.value)


def test_a_spec_holds_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    spec = parse_spec(raw_spec(env="HF_TOKEN"), Path("/")).with_env(["HF_HOME", "HF_TOKEN"])
    assert spec.cluster.env == ("HF_TOKEN", "HF_HOME")
    assert SECRET not in yaml.safe_dump(spec.model_dump(mode="json"))


@pytest.mark.parametrize("command", ["run", "harvest", "plan", "submit"])
def test_a_name_that_is_not_set_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(raw_spec(env=["HF_TOKEN"])))
    assert main([command, str(tmp_path / "spec.yaml")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "HF_TOKEN is not set in the environment here" in err
    assert not (tmp_path / "s").exists()


def test_a_name_that_is_given_with_its_value_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(raw_spec()))
    assert main(["submit", str(tmp_path / "spec.yaml"), "--env", f"HF_TOKEN={SECRET}"]) == 1
    out, err = capsys.readouterr()
    assert "give the name of a variable alone (HF_TOKEN)" in err
    assert SECRET not in out + err
