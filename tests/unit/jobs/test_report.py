"""The report: one page that is whole in itself, true to what the store holds, and useful when little is there."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import corpus_info, plan_table, save_no_tokenizer, write_store

from jobs.report import CONTENTS, report_page, write_report
from jobs.report.anchoring import Comparison, Score, compare, summary
from jobs.report.harvest_section import cosines
from jobs.report.latents import shaded
from jobs.report.run_view import control_line, control_of, read_runs
from pipeline.sdl.dictionary.activations import JumpReLU, Products, TopK
from pipeline.sdl.dictionary.dictionary import Initialisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import Resampling, TrainingConfig
from pipeline.sdl.train.objective import Objective
from storage.errors import StorageError
from storage.format.records import Record, digest
from storage.make.create import create_store
from storage.results.anchors import AnchorSet, read_anchors, write_anchors
from storage.results.runs import open_run
from storage.store import Store
from workers.settings.dictionaries import DictionarySettings
from workers.train.plan import as_json

SITE = "resid_post.0"
LATENTS = 8
CONFIG = DictionaryConfig((SITE,), (SITE,), (5,), (5,), LATENTS, TopK(2))
OBJECTIVE = Objective()
HOSTILE = "</script><script>alert(1)</script><b>&amp;\"'\u202e\x00\ud800"
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced while it collects what the page refers to and holds."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert value is None or "\x00" not in value
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and (value or "").startswith("#"):
                self.links.append((value or "")[1:])
            elif name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.resources.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def check(page: str) -> Page:
    """Every page, whatever the store: sound, whole in itself, all sections there and linked."""
    parsed = Page(page)
    assert parsed.resources == []
    assert not re.search(r"https?:|url\(|@import|//[a-z]", page)
    assert "script" not in parsed.tags
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert set(parsed.links) <= set(parsed.ids)
    assert [i for i in parsed.ids if i in CONTENTS] == list(CONTENTS)
    page.encode("utf-8")
    return parsed


def anchor_set(store: Store, values: tuple[str, ...] = ("de", "en", "fr"), label: str = "language") -> AnchorSet:
    vectors = np.random.default_rng(0).standard_normal((len(values), 5)).astype(np.float32)
    counts = [10 * (i + 1) for i in range(len(values))]
    return AnchorSet("languages", [label] * len(values), list(values), counts, {"by": [label]}, {SITE: vectors})


def identity(
    anchors: Record | None = None, config: DictionaryConfig = CONFIG, objective: Objective = OBJECTIVE, **training: Any
) -> Record:
    """As the planner writes it."""
    settings = TrainingConfig(steps=100, batch_rows=16, learning_rate=3e-05, objective=objective, **training)
    return {
        "corpus_digest": "c",
        "harvests": {SITE: "h"},
        "dictionary": config.record(),
        "training": as_json(asdict(settings)),
        "anchors": None if anchors is None else digest(anchors),
    }


CURVE = [
    {"step": s, "loss": 1.0, "fvu": 2.0 / (1 + s), "l0": 2.0, "dead_share": s / 1000, "anchor_cosine": None}
    for s in (0, 50, 99)
]


def group(value: str, best: float | None, anchored: float | None = None, latent: int = 0, rows: int = 20) -> Record:
    line: Record = {"anchors": "languages", "label": "language", "value": value, "rows": rows}
    line |= {"best_latent": None if best is None else latent, "best_auroc": best}
    if anchored is not None or best is None:
        line |= {"anchored_latent": ("de", "en", "fr").index(value), "anchored_auroc": anchored, "anchor_cosine": 0.9}
    return line


def evaluation(groups: list[Record], token: str = " grain", **more: Any) -> Record:
    context = {
        "row": 170,
        "document": 3,
        "source": f"corpus.parquet:3{token}",
        "labels": {"language": f"de{token}"},
        "tokens": ["the", token, "\n    ", token],
        "activations": [0.0, 2.0, 1.0, 0.0],
    }
    return {
        "identity": {"run": "r", "anchors": "a", "settings": {}},
        "row_start": 160,
        "row_stop": 203,
        "rows": 43,
        "fvu": 0.21904,
        "l0": 2.0,
        "dead_share": 0.125,
        "density": [0.0, 0.5, 0.25, 0.01, 0.02, 0.04, 0.001, 1.0],
        "loss": {
            "predictions": 30,
            "clean": 1.5,
            "spliced": 1.75,
            "zero_ablated": 6.5,
            "mean_ablated": 4.0,
            "recovered_against_zero": 0.95,
            "recovered_against_mean": 0.9,
            "contexts": 4,
        },
        "auroc_rows": 43,
        "subpopulations": groups,
        "latents": [
            {"latent": i, "why": [f"because of {token}"], "density": 0.25, "contexts": [context, context]}
            for i in range(LATENTS)
        ],
        **more,
    }


def add_run(
    store: Store, name: str, which: Record, *, finished: bool = True, found: Record | None = None, anchors: str = ""
) -> None:
    """A run's folder, written by the functions that the trainer and the evaluator use."""
    run = open_run(store, name)
    about = {"anchors": anchors or None, "made_with": {}}
    run.begin(which, about)
    if not finished:
        run.save_checkpoint(CURVE[:2], b"")
        return
    record = {"format": 1, "activation": "topk", "config": which["dictionary"], "identity": which, **about}
    run.finish(CURVE, {"dictionary.json": json.dumps(record).encode()})
    if found is not None:
        run.write_evaluation(found)


ANCHORED = [group("de", 0.9, 0.9), group("en", 0.8, 0.6, latent=5), group("fr", None, rows=0)]
CONTROL = [group("de", 0.7, latent=4), group("en", 0.85, latent=4), group("fr", None, rows=0)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Harvested, anchored, no runs."""
    store = write_store(tmp_path / "store", held_out_start=160)
    write_anchors(store, anchor_set(store))
    return store


@pytest.fixture
def complete(store: Store) -> Store:
    """An anchored run with its control, both evaluated."""
    add_run(store, "anchored", identity({"by": 1}), found=evaluation(ANCHORED), anchors="languages")
    add_run(store, "control", identity(), found=evaluation(CONTROL))
    return store


def test_a_complete_store(complete: Store) -> None:
    page = check(report_page(complete, "granary report x"))
    for figure in (
        "203",
        "resid_post.0, mlp_out.0",
        "0.219",
        "12.5",
        "95.0",
        "1.75",
        "1 of 8 latents dead",
        "granary report x",
    ):
        assert figure in page.text.replace("\u202f", " "), figure
    assert "Next:" not in page.text
    assert {"svg", "polyline", "mark", "details"} <= page.tags


def test_a_page_takes_the_place_of_another(complete: Store, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    write_report(complete, out)
    page = out.read_text(encoding="utf-8")
    check(page)
    assert page.endswith("</html>\n")
    assert f"granary report {complete.path} --out {out}" in page
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_place_that_cannot_be_written(complete: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"folder .*nowhere does not exist: make it"):
        write_report(complete, tmp_path / "nowhere" / "report.html")
    with pytest.raises(StorageError, match="is a folder"):
        write_report(complete, tmp_path)


def test_what_is_in_the_store_cannot_become_markup(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a<b>&'store", held_out_start=160)
    values = (HOSTILE.replace("\ud800", ""), "<i>", "plain")  # Parquet and JSON hold no lone surrogate; tokens may
    write_anchors(store, anchor_set(store, values, label="<label>"))
    hostile = [{**g, "value": v, "label": "<label>"} for g, v in zip(ANCHORED, values, strict=True)]
    add_run(store, "anchored", identity({}), found=evaluation(hostile, HOSTILE), anchors="languages")
    page = report_page(store, HOSTILE)
    parsed = check(page)
    assert "alert(1)" in parsed.text
    assert not {"b<", "i<"} & parsed.tags
    assert "\x00" not in page
    assert "\u202e" not in page


# ---- stores that are not complete


def boxes(page: str) -> list[str]:
    """The commands that the page says come next."""
    return re.findall(r"Next: <code>([^<]*)</code>", page)


def planned_store(path: Path) -> Store:
    table = plan_table(100, 5)
    skipped = {"empty": {"count": 12, "first": ["a:1", "a:2"]}, "undecodable": {"count": 1, "first": ["a:9"]}}
    info = corpus_info(table, 32)
    return create_store(path, table, lambda d: replace(info(d), skipped=skipped), save_no_tokenizer)


def test_planned_only(tmp_path: Path) -> None:
    page = report_page(planned_store(tmp_path / "store"), "")
    parsed = check(page)
    assert set(boxes(page)) == {"granary harvest SPEC"}
    assert "12 documents: empty (first a:1, a:2)" in parsed.text
    assert "1 document: undecodable" in parsed.text


def test_harvest_half_done(tmp_path: Path) -> None:
    page = report_page(write_store(tmp_path / "store", units=range(3)), "")
    assert "4 of 7 units are not harvested yet" in check(page).text
    assert set(boxes(page)) == {"granary harvest SPEC"}


def test_no_anchors_and_no_runs(tmp_path: Path) -> None:
    page = report_page(write_store(tmp_path / "store", held_out_start=160), "")
    parsed = check(page)
    assert boxes(page) == ["granary anchors SPEC", "granary train SPEC"]
    assert "anchors: {name: subpopulations, by: [language]}" in parsed.text
    assert f"- {{name: sae, input: {SITE}, latents: 40}}" in parsed.text


def test_no_labels(store: Store) -> None:
    bare = Store(store.root, replace(store.info, labels=[]))
    (store.path / "anchors" / "languages" / "anchors.json").unlink()
    assert "This store has no labels" in check(report_page(bare, "")).text


def test_a_run_that_is_not_finished(store: Store) -> None:
    add_run(store, "sae", identity(), finished=False)
    page = report_page(store, "")
    assert "sae is not finished: it is at step 51 of 100" in check(page).text
    assert set(boxes(page)) == {"granary train SPEC"}


def test_a_run_that_began_and_has_no_curve(store: Store) -> None:
    open_run(store, "sae").begin(identity(), {"anchors": None, "made_with": {}})
    assert "at step 0 of 100" in check(report_page(store, "")).text


def test_a_run_that_is_not_evaluated(store: Store) -> None:
    add_run(store, "sae", identity({}), anchors="languages")
    page = report_page(store, "")
    assert "sae is trained and not evaluated" in check(page).text
    assert set(boxes(page)) == {"granary evaluate SPEC"}


def test_a_run_that_cannot_be_evaluated(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    add_run(store, "sae", identity())
    page = report_page(store, "")
    assert "cannot be evaluated, as this store holds no rows out" in check(page).text
    assert "granary evaluate SPEC" not in boxes(page)


def test_a_control_that_is_not_evaluated(store: Store) -> None:
    add_run(store, "anchored", identity({}), found=evaluation(ANCHORED), anchors="languages")
    add_run(store, "control", identity())
    page = report_page(store, "")
    assert "The control is not ready" in check(page).text
    assert "granary evaluate SPEC" in boxes(page)


def test_a_control_measured_on_other_rows_is_not_compared(store: Store) -> None:
    add_run(store, "anchored", identity({}), found=evaluation(ANCHORED), anchors="languages")
    add_run(store, "control", identity(), found=evaluation(CONTROL, auroc_rows=7))
    parsed = check(report_page(store, ""))
    assert "was evaluated on other rows" in parsed.text
    assert "0.850" not in parsed.text


def test_the_fvu_of_each_site_where_there_are_several(store: Store) -> None:
    add_run(store, "sae", identity(), found=evaluation(CONTROL, site_fvu={"resid_post.0": 0.125}))
    assert "FVU of each site" not in report_page(store, "")
    both = {"resid_post.0": 0.125, "mlp_out.0": 0.875}
    add_run(store, "crosscoder", identity({}), found=evaluation(CONTROL, site_fvu=both))
    assert "FVU of each site: crosscoder: resid_post.0 0.125, mlp_out.0 0.875." in check(report_page(store, "")).text


def test_an_evaluation_without_subpopulations_or_latents(store: Store) -> None:
    found = evaluation([], latents=[], density=[0.0] * LATENTS, fvu=math.nan, dead_share=1.0)
    add_run(store, "anchored", identity({}), found=found, anchors="languages")
    parsed = check(report_page(store, ""))
    assert "did not score what it is anchored to" in parsed.text
    assert "No latent fired" in parsed.text


# ---- anchoring


def test_whichever_wins_is_bold(complete: Store) -> None:
    page = report_page(complete, "")
    bold = re.findall(r"<b>(\d\.\d{3})</b>", page)
    assert bold == ["0.900", "0.850"]  # the anchored latent for de, the control's best for en, nobody for fr
    text_ = Page(page).text
    assert "beats the best latent of control for 1 of 2 subpopulations" in text_
    assert "best latent of its own dictionary for 1 of 2" in text_
    assert "without a score: fr" in text_


@pytest.mark.parametrize(
    ("anchored", "best", "control", "winners"),
    [
        (0.9, 0.9, 0.8, {"anchored", "best"}),
        (0.7, 0.9, 0.8, {"best"}),
        (0.7, 0.75, 0.8, {"control"}),
        (0.8, 0.8, 0.8, {"anchored", "best", "control"}),
        (0.7, 0.9, None, {"best"}),
        (None, None, None, set()),
    ],
)
def test_winners(anchored: float | None, best: float | None, control: float | None, winners: set[str]) -> None:
    def score(auroc: float | None) -> Score | None:
        return None if auroc is None else Score(0, auroc, 0.1)

    line = Comparison("l", "v", 10, 1.0, score(anchored), score(best), score(control))
    assert line.winners == winners


def test_the_summary_counts_large_subpopulations_apart() -> None:
    own = [group("de", 0.9, 0.9, rows=5000), group("en", 0.6, 0.6, rows=20), group("fr", 0.7, 0.7, rows=20)]
    other = [group("de", 0.8), group("en", 0.7), group("fr", 0.6)]
    words = summary(compare(evaluation(own), evaluation(other)), 8, "control")
    assert "for 2 of 3 subpopulations</b>, and for 1 of the 1 with at least 1\u202f000 held-out rows" in words
    assert "Best&rdquo; is chosen among all 8 latents on the very rows" in words
    assert "beats" not in summary(compare(evaluation(own), None), 8, "control")


def test_the_control_differs_in_its_anchors_alone(store: Store) -> None:
    otherwise = identity({}, objective=Objective(anchoring=0.5, anchoring_end=0.5), anchors_first=False)
    add_run(store, "anchored", otherwise, found=evaluation(ANCHORED), anchors="languages")
    add_run(store, "other-anchors", identity({"x": 1}), anchors="languages")
    add_run(store, "other-seed", identity(seed=1), found=evaluation(CONTROL))
    runs = read_runs(store)
    assert control_of(runs[0], runs) is None
    add_run(store, "plain", identity())
    add_run(store, "twin", identity(), found=evaluation(CONTROL))
    runs = read_runs(store)
    found = control_of(runs[0], runs)
    assert found is not None
    assert found.name == "twin"  # of two the one that is evaluated


def test_the_line_that_would_make_a_control(store: Store) -> None:
    add_run(store, "anchored", identity({}), found=evaluation(ANCHORED), anchors="languages")
    page = report_page(store, "")
    (line,) = re.findall(r"<pre>(- .*)</pre>", page)
    settings = DictionarySettings.model_validate(yaml.safe_load(line)[0])
    assert (settings.name, settings.input, settings.outputs, settings.latents) == ("control", (SITE,), (SITE,), LATENTS)
    assert (settings.activation.k, settings.learning_rate, settings.anchors) == (2, 3e-05, None)
    (run,) = read_runs(store)
    assert "name: anchored-control" in control_line(run, ["anchored", "control"])


def test_the_control_of_a_dictionary_with_every_option_has_them_too(store: Store) -> None:
    layers = ("mlp_in.0", "mlp_in.1"), ("mlp_out.0", "mlp_out.1")
    config = DictionaryConfig(*layers, (5, 5), (5, 5), LATENTS, JumpReLU(0.2, 0.3), cross_layer=True, skip=True)
    objective = Objective(
        l0=0.1, l0_target=3, tanh=1, tanh_scale=2, p_norm=1, p_end=0.1, p_start=0, auxk=0, anchoring=9
    )
    options = {
        "warmup_share": 0.0,
        "decay_share": 0.5,
        "dead_after_rows": 77,
        "decoder_norm": "free",
        "clip": 2.0,
        "resampling": Resampling((0.5,), 100, 0.3),
        "initialisation": Initialisation("independent", 0.5, 0.1),
        "products": Products(selection="bfloat16", dense="bfloat16"),
    }
    add_run(store, "anchored", identity({}, config, objective, **options), anchors="languages")
    (run,) = read_runs(store)
    (line,) = yaml.safe_load(control_line(run, []))
    settings = DictionarySettings.model_validate(line)
    assert settings.problems() == []
    assert settings.config(dict.fromkeys((*config.input, *config.output), 5)) == config
    assert settings.objective() == replace(objective, anchoring=0.1)
    training = settings.training(steps=1000, batch_rows=64, seed=0)
    assert training.resampling == options["resampling"]
    assert training.initialisation == options["initialisation"]
    assert training.products == options["products"]
    found = {"warmup_share": settings.warmup, "decay_share": settings.decay, "clip": settings.clip}
    found |= {"dead_after_rows": settings.dead_after_rows, "decoder_norm": settings.decoder_norm}
    assert found == {name: options[name] for name in found}


# ---- pieces


def test_shading_is_relative_to_the_strongest() -> None:
    markup = shaded(["a", "b\n      c", "d"], [0.0, 1.0, 4.0], strongest=4.0)
    assert markup == (
        'a<mark style="--a:0.25" title="1.00">b<i>↵</i><wbr>  c</mark>'
        '<mark class="peak" style="--a:1.00" title="4.00">d</mark>'
    )
    assert shaded(["<"], [0.0], strongest=0.0) == "&lt;"
    assert shaded([], [], strongest=1.0) == ""


def test_a_cosine_needs_a_direction() -> None:
    found = cosines(np.array([[3, 0], [0, 2], [-1, 0], [0, 0]], dtype=np.float32))
    assert np.allclose(found[:3, :3], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]])
    assert np.isnan(found[3]).all()


def test_a_large_anchor_set_is_drawn_in_part(store: Store) -> None:
    many = tuple(f"value {i}" for i in range(60))
    write_anchors(store, replace(anchor_set(store, many), name="many"))
    assert len(read_anchors(store, "many").values) == 60
    page = report_page(store, "")
    assert "for the 48 with the most rows" in check(page).text
    assert "All 60 values" in page


def test_the_report_needs_no_torch_and_no_ray() -> None:
    code = "import jobs.report, sys; print({'torch', 'ray', 'transformers'} & {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
