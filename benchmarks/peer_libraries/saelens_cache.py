"""SAELens' CacheActivationsRunner, in its own environment: benchmarks.peers starts this file there.

One JSON line in gives the settings, and each further line starts a run; each run answers with one JSON line: rows,
seconds on the clock and seconds of a core. It needs SAELens alone, none of our packages.

Only `run` is timed: not loading the model, not making the dataset.
"""

import json
import shutil
import sys
import time
import warnings
from typing import Any


def main() -> None:
    warnings.simplefilter("ignore")
    settings = json.loads(sys.stdin.readline())
    import torch
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    torch.set_num_threads(settings["threads"])
    if settings["class"] == "HookedTransformer":
        _let_hooked_transformer_load(settings["model"])
    dataset = Dataset.from_parquet(settings["contexts"], cache_dir=settings["folder"] + "/datasets")
    for _ in sys.stdin:
        place = settings["folder"] + "/saelens"
        config: Any = CacheActivationsRunnerConfig(
            dataset_path="given below",
            model_name=settings["model"],
            model_class_name=settings["class"],
            model_from_pretrained_kwargs={"dtype": settings["model_dtype"]},
            hook_name=settings["hook"],
            d_in=settings["d_model"],
            context_size=settings["context"],
            training_tokens=settings["rows"],
            model_batch_size=settings["batch"],
            # One shard: fewer are not possible, and more cost a little each. It fills whole buffers, so this is exact.
            buffer_size_gb=settings["rows"] * settings["d_model"] * settings["bytes"] / 1e9,
            dtype=settings["dtype"],
            compile_llm=settings["compile"],
            new_cached_activations_path=place,
            shuffle=False,
            device="cpu",
        )
        runner = CacheActivationsRunner(config, override_dataset=dataset)
        started, cpu = time.perf_counter(), time.process_time()
        cached = runner.run()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        rows = len(cached) * settings["context"]
        del runner, cached
        shutil.rmtree(place)
        print(json.dumps({"rows": rows, "seconds": seconds, "core_seconds": cpu}), flush=True)


def _let_hooked_transformer_load(folder: str) -> None:
    """transformer_lens takes a local model of a known architecture, once its list of names is not asked about it."""
    from transformer_lens import loading_from_pretrained

    known = loading_from_pretrained.get_official_model_name
    loading_from_pretrained.get_official_model_name = lambda name: name if name == folder else known(name)


if __name__ == "__main__":
    main()
