"""Which type products are made in: decided from the machine, recorded, and kept by what goes on elsewhere."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start_harvest, write_store
from lab import Lab
from small_training import SETTINGS, batch, make_trainer

import pipeline.precision as precision
from pipeline.errors import InputError
from pipeline.lrb.cells import train_cell
from pipeline.lrb.data import Bench
from pipeline.lrb.methods import Cell, Size
from pipeline.model.describe import describe_model
from pipeline.model.load import linear_shapes
from pipeline.precision import faster_type, slowdown
from pipeline.sdl.dictionary.activations import Products
from storage.harvest.harvest import Harvest, declare_harvest
from storage.harvest.identity import BLOCKS
from storage.results.runs import Run, open_run
from storage.store import Store, open_store
from workers.bench.cells import file_of, identity_of, recorded_products
from workers.harvest.stage import emulation_notice, prepare_harvests
from workers.settings.experiment import HarvestSettings, ModelSettings, TrainSettings
from workers.train.plan import emulated_products, plan_training
from workers.train.trainer import Trainer

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""torch and its matrix library on a larger x86 processor, as on one that has AVX2 alone."""
QUICK = Size(Bench(30, 24, 500, 0.9, 0.25), 60, 4, 64, 5e-3, 3, 5)
TWO = {"float32": "bfloat16", "bfloat16": "float32"}


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    precision._faster_type.cache_clear()
    yield
    precision._faster_type.cache_clear()


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`be("float32")`: from here on the machine is one that is faster in that type."""

    def become(kind: str) -> None:
        precision._faster_type.cache_clear()
        monkeypatch.setattr(precision, "_known_of_processor", lambda: kind == "bfloat16")

    return become


# ---- what the machine is


@pytest.mark.parametrize(
    ("library", "avx512_bf16", "amx", "machine", "others", "known"),
    [
        (False, True, True, "x86_64", {}, False),  # the library is limited, or cannot
        (False, False, False, "aarch64", {}, False),
        (True, True, False, "x86_64", {}, True),
        (True, False, True, "x86_64", {}, True),
        (True, False, False, "x86_64", {}, False),  # AVX-512 alone emulates
        (True, False, False, "AMD64", {}, False),
        (True, False, False, "x86_64", {"avx_ne_convert": True}, None),
        (True, False, False, "aarch64", {}, None),
        (True, False, False, "arm64", {}, None),
    ],
)
def test_what_instructions_tell(
    monkeypatch: pytest.MonkeyPatch,
    library: bool,
    avx512_bf16: bool,
    amx: bool,
    machine: str,
    others: dict[str, bool],
    known: bool | None,
) -> None:
    for name in AVX2:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: others, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert precision._known_of_processor() is known
    if library:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # which has AVX-512 and no bfloat16
        assert precision._known_of_processor() is None


@pytest.mark.parametrize(("ratio", "expected"), [(1.19, "float32"), (1.21, "bfloat16"), (0.01, "float32")])
def test_where_they_do_not_tell_it_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, ratio: float, expected: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(precision, "_known_of_processor", lambda: None)
    monkeypatch.setattr(precision, "_measured_ratio", lambda device: asked.append(device) or ratio)
    assert [faster_type(), faster_type("cpu"), faster_type("cpu:0")] == [expected] * 3
    assert asked == ["cpu"]


def test_a_gpu_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        precision._faster_type.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert faster_type("cuda") == ("bfloat16" if has else "float32")


def test_the_measurement_agrees_with_what_is_known() -> None:
    """A processor whose flags tell is measured all the same; between 0.8 and 1.5 it could be either."""
    known, ratio = precision._known_of_processor(), precision._measured_ratio("cpu")
    assert ratio > 0
    assert known is None or 0.8 < ratio < 1.5 or known == (ratio > 1)


# ---- products


def test_auto_becomes_the_faster_type_and_nothing_else_changes(be: Any) -> None:
    for kind, other in TWO.items():
        be(kind)
        assert Products().on("cpu") == Products(selection=kind, dense="float32")
        assert Products(dense="auto").on("cpu") == Products(selection=kind, dense=kind)
        given = Products(selection=other, dense=other)
        assert given.on("cpu") == given


def test_what_was_recorded_stands_in_place_of_auto() -> None:
    recorded = asdict(Products(selection="bfloat16", dense="bfloat16"))
    assert Products(dense="auto").as_in(recorded) == Products(selection="bfloat16", dense="bfloat16")
    assert Products(selection="float32").as_in(recorded) == Products(selection="float32")
    assert Products().as_in({}) == Products()
    with pytest.raises(InputError, match="products are computed in auto, float32 or bfloat16, not float16"):
        Products(selection="float16")


def test_a_trainer_computes_in_the_type_it_says(be: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.sdl.dictionary.selection as selection

    plain, made = selection._slabs, []
    monkeypatch.setattr(selection, "_slabs", lambda *given: made.append(given[-1]) or plain(*given))
    for kind in TWO:
        be(kind)
        trainer = make_trainer(replace(SETTINGS, products=Products()))
        trainer.step(*batch(0))
        assert trainer.products.selection == kind
        assert set(made) == {getattr(torch, kind)}
        made.clear()


# ---- what a run began with it keeps


def settings(store_rows: int, **dictionary: Any) -> TrainSettings:
    one = {"name": "sae", "input": ["resid_post.0"], "latents": 40, "activation": {"k": 2}, **dictionary}
    return TrainSettings.model_validate(
        {"rows": store_rows, "batch_rows": 16, "threads": 1, "checkpoint_every": 2, "dictionaries": [one]}
    )


class Stopped(Exception):
    pass


save = Run.save_checkpoint


@pytest.mark.parametrize("began", TWO)
def test_a_run_goes_on_as_it_began(tmp_path: Path, be: Any, monkeypatch: pytest.MonkeyPatch, began: str) -> None:
    """Begun where one type is faster, stopped at a checkpoint, and ended where the other is."""
    weights = {}
    for folder, stops in (("calm", False), ("moved", True)):
        store = write_store(tmp_path / folder, num_rows=203)
        be(began)
        trainer = Trainer(plan_training(store, settings(160)))
        if stops:
            with monkeypatch.context() as patch:

                def stop(*given: Any) -> None:
                    save(*given)
                    raise Stopped

                patch.setattr("storage.results.runs.Run.save_checkpoint", stop)
                with pytest.raises(Stopped):
                    trainer.train()
            be(TWO[began])
            plan = plan_training(store, settings(160))
            assert plan.dictionaries[0].training.products.selection == began
            trainer = Trainer(plan)
        trainer.train()
        run = open_run(store, "sae")
        assert run.record()["identity"]["training"]["products"]["selection"] == began
        be(TWO[began])
        plan_training(store, settings(160))  # which refuses what was trained otherwise
        weights[folder] = (run.folder.path / "dictionary.safetensors").read_bytes()
    assert weights["calm"] == weights["moved"]


def test_a_type_that_is_asked_for_is_not_the_recorded_one(tmp_path: Path, be: Any) -> None:
    be("float32")
    store = write_store(tmp_path / "store", num_rows=203)
    Trainer(plan_training(store, settings(160))).train()
    plan_training(store, settings(160, precision="float32"))
    with pytest.raises(ValueError, match=r"selection: 'float32' .*'bfloat16'"):
        plan_training(store, settings(160, precision="bfloat16"))


def test_cells_of_a_table_are_computed_alike(tmp_path: Path, be: Any) -> None:
    """A folder with one cell of another machine: the next cells are computed as that one."""
    be("bfloat16")
    first, second = (Cell(QUICK, "topk", "plain", seed) for seed in (0, 1))
    record = {"identity": identity_of(first), **train_cell(first)}
    assert record["products"] == {"sparse": True, "selection": "bfloat16", "dense": "bfloat16"}
    assert recorded_products(tmp_path, [first, second]) is None
    file_of(tmp_path, first).parent.mkdir()
    file_of(tmp_path, first).write_text(json.dumps(record))
    be("float32")
    assert identity_of(first) == record["identity"]
    assert recorded_products(tmp_path, [second, first]) == record["products"]
    assert train_cell(second, record["products"])["products"] == record["products"]
    assert train_cell(second)["products"]["dense"] == "float32"


# ---- harvests


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, llama: Path, corpus: Path) -> tuple[Store, Path]:
    folder = tmp_path_factory.mktemp("planned")
    return start_harvest(folder / "store", llama, corpus, ["resid_post.0"]).store, llama


def harvests_of(planned: tuple[Store, Path], **options: Any) -> list[Harvest]:
    store, llama = planned
    options = {"sites": ("mlp_in.0",), "compile": True, "threads_per_worker": 1, **options}
    model = ModelSettings(id=str(llama), dtype=options.pop("model_dtype", "bfloat16"))
    jobs = prepare_harvests(store, model, describe_model(model.id), HarvestSettings(**options))
    return [job.harvest for job in jobs]


def test_layers_attend_in_blocks_where_that_is_faster(planned: tuple[Store, Path], be: Any) -> None:
    be("bfloat16")
    (fast,) = harvests_of(planned)
    be("float32")
    (slow,) = harvests_of(planned)
    assert (fast.identity.computation.attention_in_blocks, slow.identity.computation.attention_in_blocks) == (
        True,
        False,
    )
    assert BLOCKS not in fast.identity.record["harvest"]  # so that harvests of before keep their names
    assert fast.digest != slow.digest
    for other in ({"compile": False}, {"model_dtype": "float32"}, {"gpus_per_worker": 1}):
        assert all(BLOCKS not in harvest.identity.record["harvest"] for harvest in harvests_of(planned, **other))


@pytest.mark.parametrize("began", TWO)
def test_a_harvest_goes_on_as_it_began(tmp_path: Path, llama: Path, corpus: Path, be: Any, began: str) -> None:
    be(began)
    store = start_harvest(tmp_path / "store", llama, corpus, ["resid_post.0"]).store
    (first,) = harvests_of((store, llama))
    declare_harvest(store.root, store.num_rows, first)
    be(TWO[began])
    (second,) = harvests_of((open_store(store.url), llama))
    assert second.digest == first.digest
    assert second.identity.computation.attention_in_blocks == (began == "bfloat16")


def test_a_type_that_is_emulated_is_said_before_the_work(llama: Path, be: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    info = describe_model(str(llama))
    assert linear_shapes(info) == [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    monkeypatch.setattr("workers.harvest.stage.slowdown", lambda shapes, dtype: 5.04)
    sites = HarvestSettings(sites=("mlp_in.0",))

    def notice(dtype: str, settings: HarvestSettings = sites) -> str | None:
        return emulation_notice(info, ModelSettings(id=str(llama), dtype=dtype), settings)

    be("float32")
    words = f"no instructions for bfloat16 and takes 5.0 times as long for a layer of {llama} as in float32"
    assert words in (notice("bfloat16") or "")
    assert "write model.dtype: float32" in (notice("float16") or "")
    assert notice("float32") is None
    assert notice("bfloat16", HarvestSettings(sites=("mlp_in.0",), gpus_per_worker=1)) is None
    be("bfloat16")
    assert notice("bfloat16") is None
    assert notice("float32") is None
    be("float32")
    monkeypatch.setattr("workers.harvest.stage.slowdown", lambda shapes, dtype: 1.1)
    assert notice("float16") is None


@pytest.mark.parametrize("kind", TWO)
def test_a_plan_says_it_too(stored: Lab, be: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    be(kind)
    monkeypatch.setattr("workers.harvest.stage.slowdown", lambda shapes, dtype: 5.04)
    words = "model.dtype: this processor has no instructions for bfloat16 and takes 5.0 times as long"
    plan = stored.run("plan", stored.spec({"model.dtype": "bfloat16", "store": str(stored.folder / "other")}))
    assert (f"note       {words}" in plan) == (kind == "float32")


def test_how_much_slower_is_timed() -> None:
    assert slowdown([(64, 64)], "float32") == pytest.approx(1)
    assert 0.01 < slowdown([(256, 512), (256, 4096)], "bfloat16") < 1000


def test_emulated_products_are_said(be: Any) -> None:
    be("float32")
    assert "so that sae will train many times slower" in (emulated_products(settings(160, precision="bfloat16")) or "")
    assert emulated_products(settings(160)) is None
    be("bfloat16")
    assert emulated_products(settings(160, precision="bfloat16")) is None


# ---- a real machine with AVX2 alone

PATHS = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, pipeline.sdl.dictionary.selection as selection
from pipeline.precision import faster_type
from pipeline.lrb.cells import train_cell
from pipeline.lrb.methods import Cell
from small_training import SETTINGS, batch, make_trainer
from unit.capture.test_precision import QUICK
plain, made = selection._slabs, []
selection._slabs = lambda *given: made.append(str(given[-1])) or plain(*given)
trainer = make_trainer()
trainer.step(*batch(0))
folder, llama, corpus = map(Path, sys.argv[2:5])
options = {"model_dtype": "bfloat16", "compile": True}
compiled = conftest.start_harvest(folder / "compiled", llama, corpus, ["mlp_in.0"], **options)
whole = conftest.harvest(folder / "whole", llama, corpus, ["mlp_in.0"], model_dtype="bfloat16")
print(json.dumps({
    "faster": faster_type(),
    "trainer": trainer.products.selection,
    "slabs": sorted(set(made)),
    "cell": train_cell(Cell(QUICK, "topk", "plain", 0))["products"],
    "blocks": compiled.jobs[0].harvest.identity.computation.attention_in_blocks,
    "attention": compiled.harvesters[0]._runner.model.config._attn_implementation,
    "rows": int(whole.read("mlp_in.0", slice(0, 100)).shape[0]),
}))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86 processors")
def test_a_machine_with_avx2_alone_takes_float32_throughout(tmp_path: Path, llama: Path, corpus: Path) -> None:
    """A training step, a cell of the bench and a harvest in a process whose matrix library has AVX2 alone."""
    tests = Path(__file__).parents[2]
    environment = {**os.environ, **AVX2, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests / "faults")])}
    done = subprocess.run(
        [sys.executable, "-c", PATHS, str(tests), str(tmp_path), str(llama), str(corpus)],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "faster": "float32",
        "trainer": "float32",
        "slabs": ["torch.float32"],
        "cell": {"sparse": True, "selection": "float32", "dense": "float32"},
        "blocks": False,
        "attention": "sdpa",
        "rows": 100,
    }


SHARED_CACHE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pipeline.sites import Site
from unit.capture.test_attention import activations
torch.save(activations(1, [Site(0, "mlp_in")], torch.float32, compiled=True)[Site(0, "mlp_in")], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86 processors")
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling on CPU needs g++, and it is not here")
def test_what_was_compiled_for_a_larger_processor_is_not_run_on_a_smaller_one(tmp_path: Path) -> None:
    """Layers compiled twice with one cache on disk: as the machine is, then as if it had AVX2 alone."""
    tests = Path(__file__).parents[2]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests / "faults")])
    rows = []
    for number, more in enumerate(({}, AVX2)):
        command = [sys.executable, "-c", SHARED_CACHE, str(tests), str(tmp_path / f"{number}.pt")]
        subprocess.run(command, env={**environment, **more}, check=True, timeout=600)
        rows.append(torch.load(tmp_path / f"{number}.pt"))
    torch.testing.assert_close(*rows, atol=1e-4, rtol=1e-4)
