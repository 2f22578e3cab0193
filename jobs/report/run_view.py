"""What the report needs to know of a run, read once; and which run is the control of which."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from storage.format.records import Record
from storage.results.runs import list_runs
from storage.store import Store


@dataclass(frozen=True)
class RunView:
    """A run with its records, as they were when the report was begun."""

    name: str
    identity: Record
    anchors: str | None
    """The name of the anchor set it is anchored to."""
    finished: bool
    curve: list[Record]
    evaluation: Record | None
    can_evaluate: bool
    """True if the store holds rows out to measure on."""

    @property
    def config(self) -> Record:
        """Sites, widths, latents and activation."""
        config: Record = self.identity["dictionary"]
        return config

    @property
    def steps(self) -> int:
        return int(self.identity["training"]["steps"])

    @property
    def steps_done(self) -> int:
        return self.steps if self.finished else self.curve[-1]["step"] + 1 if self.curve else 0

    @property
    def activation(self) -> str:
        """'topk, k = 32', or 'relu'."""
        values = dict(self.config["activation"])
        return ", ".join([values.pop("kind"), *(f"{name} = {value:g}" for name, value in values.items())])

    @property
    def sites(self) -> str:
        """'resid_post.8', or 'mlp_in.8 → mlp_out.8'."""
        source, target = ", ".join(self.config["input"]), ", ".join(self.config["output"])
        return source if source == target else f"{source} → {target}"

    @property
    def next_step(self) -> tuple[str, str]:
        """What is missing and the command that makes it; two empty strings for an evaluated run."""
        if not self.finished:
            return (
                f"{self.name} is not finished: it is at step {self.steps_done} of {self.steps}.",
                "granary train SPEC",
            )
        if self.evaluation is not None:
            return "", ""
        if not self.can_evaluate:
            return (
                f"{self.name} is trained and cannot be evaluated, as this store holds no rows out. Set corpus.holdout "
                "in the spec and run it into another store.",
                "granary run SPEC",
            )
        return f"{self.name} is trained and not evaluated on held-out rows yet.", "granary evaluate SPEC"


def read_runs(store: Store) -> list[RunView]:
    """Every run of the store, by name."""
    views = []
    for run in list_runs(store):
        record = run.record()
        views.append(
            RunView(
                name=run.name,
                identity=record["identity"],
                anchors=record["anchors"],
                finished=run.is_finished,
                curve=run.curve(),
                evaluation=run.evaluation() if run.is_finished else None,
                can_evaluate=store.info.held_out_start < store.num_rows,
            )
        )
    return views


def control_of(run: RunView, runs: Sequence[RunView]) -> RunView | None:
    """The run that differs from `run` only in having no anchors; of several the one that got furthest.

    What is about anchoring is left out of the comparison: without anchors it has no effect.
    """
    wanted = _without_anchors(run.identity)
    found = [r for r in runs if r.anchors is None and r is not run and _without_anchors(r.identity) == wanted]
    return max(found, key=lambda r: (r.evaluation is not None, r.steps_done), default=None)


def _without_anchors(identity: Record) -> Record:
    training = {k: v for k, v in identity["training"].items() if k != "anchors_first"}
    objective = {k: v for k, v in training.get("objective", {}).items() if not k.startswith("anchoring")}
    return {**{k: v for k, v in identity.items() if k != "anchors"}, "training": {**training, "objective": objective}}


def control_line(run: RunView, names: Sequence[str]) -> str:
    """The line for `train.dictionaries` of a spec that would train the control of `run`, under a name not in use."""
    config, training = run.config, run.identity["training"]
    line: dict[str, Any] = {
        "name": f"{run.name}-control" if "control" in names else "control",
        "input": config["input"],
    }
    if config["output"] != config["input"]:
        line["output"] = config["output"]
    line |= {"latents": config["latents"], "activation": config["activation"]}
    line |= {key: config[key] for key in ("cross_layer", "skip", "shared_latents") if config[key]}
    line |= {"loss": _loss(training["objective"]), "learning_rate": training["learning_rate"]}
    line |= {"warmup": training["warmup_share"], "decay": training["decay_share"]}
    kept = ("decoder_norm", "clip", "resampling", "initialisation", "dead_after_rows")
    line |= {key: training[key] for key in kept if training[key] is not None}
    if training["tied"]:
        line["tied"] = True
    if not training["products"]["sparse"]:
        line["exact"] = True
    elif (precision := training["products"]["dense"]) == training["products"]["selection"]:
        line["precision"] = precision
    return "- " + yaml.safe_dump(line, default_flow_style=True, sort_keys=False, width=10_000).strip()


def _loss(objective: Record) -> Record:
    """The loss section of a spec that means this objective, but for anchoring; what has no effect is left out."""
    off = {name for name in ("l1", "l0", "tanh", "p_norm", "preactivation") if not objective[name]}
    off |= {"tanh_scale"} if "tanh" in off else set()
    off |= {"p_end", "p_start"} if "p_norm" in off else set()
    off |= {"sparsity_warmup"} if {"l1", "l0", "tanh", "p_norm"} <= off else set()
    return {
        name: value
        for name, value in objective.items()
        if not name.startswith("anchoring") and name not in off and value is not None and value != []
    }
