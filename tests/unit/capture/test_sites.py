"""Sites as people write them."""

import pytest

from pipeline.errors import InputError
from pipeline.sites import KINDS, Site, expand_sites, parse_site


@pytest.mark.parametrize("kind", KINDS)
def test_parses_and_writes_back(kind: str) -> None:
    assert parse_site(f"{kind}.12") == Site(12, kind)
    assert str(parse_site(f"{kind}.12")) == f"{kind}.12"


def test_expands_lists_and_ranges() -> None:
    assert expand_sites(["resid_post.{4,8,12}"]) == ["resid_post.4", "resid_post.8", "resid_post.12"]
    assert expand_sites(["mlp_in.4-6"]) == ["mlp_in.4", "mlp_in.5", "mlp_in.6"]
    assert expand_sites(["mlp_in.{0, 2-3}"]) == ["mlp_in.0", "mlp_in.2", "mlp_in.3"]
    assert expand_sites(["mlp_in.3-3"]) == ["mlp_in.3"]


def test_keeps_order_and_drops_repeats() -> None:
    assert expand_sites(["mlp_out.2", "mlp_out.0-2", "mlp_out.02"]) == ["mlp_out.2", "mlp_out.0", "mlp_out.1"]


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("resid_pots.3", "resid_post.3"), ("mlp_int.0", "mlp_in.0"), ("atn_out.1", "attn_out.1")],
)
def test_suggests_the_nearest_name(text: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {nearest}"):
        parse_site(text)


def test_names_all_kinds_when_none_is_near() -> None:
    with pytest.raises(InputError) as caught:
        parse_site("xyz.1")
    assert all(kind in str(caught.value) for kind in KINDS)


@pytest.mark.parametrize("text", ["resid_post", "resid_post.", "resid_post.-1", "resid_post.1.5", "resid_post.x"])
def test_refuses_a_site_without_a_layer(text: str) -> None:
    with pytest.raises(InputError, match="needs a layer number"):
        parse_site(text)


@pytest.mark.parametrize("text", ["resid_post.5-3", "resid_post.{}", "resid_post.{1", "resid_post.{1,}", "nowhere.1-2"])
def test_refuses_bad_lists_and_ranges(text: str) -> None:
    with pytest.raises(InputError):
        expand_sites([text])


def test_a_site_may_say_its_stored_type() -> None:
    assert parse_site("mlp_in.3@int8") == Site(3, "mlp_in", "int8")
    assert str(parse_site("mlp_in.3@int8")) == "mlp_in.3@int8"
    assert expand_sites(["mlp_in.{0,2-3}@float16", "mlp_in.0"]) == [
        "mlp_in.0@float16",
        "mlp_in.2@float16",
        "mlp_in.3@float16",
        "mlp_in.0",
    ]
