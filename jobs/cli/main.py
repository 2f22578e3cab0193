"""The command `granary`. Each verb is a few lines: parse, call, print. Refusals are one sentence and exit status 1.

Heavy imports (torch, transformers, Ray) happen inside the verbs that need them, so that `--help` and queries are quick.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jobs.cli.query import add_options as query_options
from jobs.ending import REFUSED, refusal, status_of, terminable

GROW = "append to the store what it lacks of the spec's rows (more rows, or more entries of corpus.path)"

ENV = "a variable of this environment that the job gets too, as HF_TOKEN; again for more (beside cluster.env)"

ADDRESS = "the cluster, as head:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, then this machine)"

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    verb: Verb = arguments.verb
    try:
        with terminable():
            return verb(arguments)
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted; what is committed stays, and the same command goes on from there", file=sys.stderr)
        return status_of(interrupt)
    except BrokenPipeError:
        return REFUSED  # the reader of our output went away, as `head` does
    except Exception as error:  # told apart here; what is not a refusal is raised again
        message = refusal(error)
        if message is None:
            raise
        print(f"granary: {message}", file=sys.stderr)
        return int(getattr(error, "exit_status", REFUSED))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="granary",
        description="Harvest the activations of Llama-family models into a store, query them, train dictionaries.",
        epilog="start with: granary demo",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(verb=lambda arguments: _help(parser))  # without a command
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, verb: Verb, text: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(verb=verb)
        return added

    demo = add("demo", _demo, "the whole pipeline on a tiny Llama and Python's standard library", "granary demo")
    demo.add_argument("--folder", default="granary-demo", help="where to put corpus, spec, store and report")

    plan = add("plan", _plan, "say what a spec takes and costs, and write nothing", "granary plan spec.yaml --measure")
    plan.add_argument("spec", help="the spec file")
    seconds: dict[str, Any] = {"nargs": "?", "type": float, "const": 5.0, "metavar": "SECONDS"}
    plan.add_argument("--measure", help="run the model here for its rate and what rounding costs (5 s)", **seconds)
    plan.add_argument("--rows-per-second", type=float, metavar="RATE", help="the rate of a worker, if you know it")
    plan.add_argument("--prices", metavar="FILE", help="your price table (default: the one that comes with Granary)")
    plan.add_argument("--grow", action="store_true", help="as of harvest; what it would append is counted anyway")
    plan.add_argument("--json", action="store_true", help="print JSON")

    stages = {
        "harvest": "plan the rows and store the activations of a spec",
        "anchors": "make the anchors of a spec from its harvest",
        "train": "train the dictionaries of a spec",
        "evaluate": "measure the trained dictionaries of a spec on held-out rows",
        "run": "all stages of a spec; what is done is left alone",
    }
    for name, text in stages.items():
        stage = add(name, _stage(name), text, f"granary {name} spec.yaml")
        stage.add_argument("spec", help="the spec file")
        if name in ("harvest", "run"):
            stage.add_argument("--grow", action="store_true", help=GROW)

    status = add("status", _status, "what a store holds", "granary status /data/acts")
    status.add_argument("store", help="the store, or a spec that names it")
    status.add_argument("--json", action="store_true", help="print JSON")

    verify = add("verify", _verify, "check every byte of a store", "granary verify /data/acts --audit 3 --repair")
    verify.add_argument("store", help="the store, or a spec that names it, its model and where that runs")
    verify.add_argument("--audit", type=_count, default=0, metavar="N", help="run N random units with the model again")
    verify.add_argument("--seed", type=_count, default=0, help="seed of the audit's choice (default: 0)")
    verify.add_argument("--repair", action="store_true", help="write again what the store or the model determines")
    verify.add_argument(
        "--model", action="append", default=[], metavar="ID[@REVISION]", help="where a harvest's model is now"
    )
    verify.add_argument("--json", action="store_true", help="print JSON")

    query = add(
        "query",
        _query,
        "SQL over the tables documents, rows, tokens, units and sites of a store",
        "granary query /data/acts 'select row from rows where position = 1 limit 1000' --site resid_post.8 --out x.npy",
    )
    query.add_argument("store", help="the store, or a spec that names it")
    query_options(query)

    report = add(
        "report", _report, "write one HTML page about a store and its dictionaries", "granary report /data/acts"
    )
    report.add_argument("store", help="the store, or a spec that names it")
    report.add_argument("--out", help="the page (default: report.html inside the store)")

    bench = add(
        "bench",
        _bench,
        "measure training methods where the answer is known",
        "granary bench lrb --size small --method topk --method batch_topk",
    )
    bench.add_argument("name", choices=("lrb",), help="lrb: the Linear Representation Bench (arXiv 2512.05534)")
    bench.add_argument("--size", default="small", help="small (a minute a seed), quarter, half or full (the paper's)")
    bench.add_argument("--method", action="append", metavar="NAME", help="a method; again for more (default: seven)")
    bench.add_argument("--arm", action="append", metavar="NAME", help="plain, anchored, random (default: these), truth")
    bench.add_argument("--seeds", type=_positive, default=3, metavar="N", help="seeds of each cell (default: 3)")
    bench.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another constant, as k=10")
    bench.add_argument("--out", metavar="FOLDER", help="cells, lrb.md, .json, .svg (default: granary-lrb-SIZE)")
    bench.add_argument("--threads", type=_positive, default=1, metavar="N", help="CPU threads of a cell (default: 1)")
    bench.add_argument("--address", default="local", help="a Ray cluster, as cluster.address (default: local)")

    submit = add("submit", _submit, "run a spec as a job on a running Ray cluster", "granary submit spec.yaml --follow")
    submit.add_argument("spec", help="the spec file")
    submit.add_argument("--stage", choices=(*stages,), default="run", help="what the job runs (default: run)")
    submit.add_argument("--grow", action="store_true", help=GROW)
    submit.add_argument("--env", action="append", default=[], metavar="NAME", help=ENV)
    submit.add_argument("--id", help="the job's id (default: one from the store's name and the time)")
    submit.add_argument("--follow", action="store_true", help="print the job's log and end with its exit status")
    listed = add("jobs", _jobs, "the jobs of a cluster", "granary jobs")
    listed.add_argument("--json", action="store_true", help="print JSON")
    logs = add("logs", _logs, "print a job's log", "granary logs granary-acts-20260101-120000 --follow")
    logs.add_argument("job", help="the job's id")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    stop = add("stop", _stop, "stop a job; what it committed stays", "granary stop granary-acts-20260101-120000")
    stop.add_argument("job", help="the job's id")
    for parser_of_job in (submit, listed, logs, stop):
        parser_of_job.add_argument("--address", help=ADDRESS)
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _stage(name: str) -> Verb:
    def verb(arguments: argparse.Namespace) -> int:
        from jobs.run import STAGES, run_stages
        from jobs.spec.spec import load_spec

        grow = getattr(arguments, "grow", False)
        did = run_stages(load_spec(arguments.spec), STAGES if name == "run" else (name,), grow=grow)
        if not did and name == "run":
            print("nothing to do: every stage of the spec is finished")
        return 0

    return verb


def _demo(arguments: argparse.Namespace) -> int:
    from jobs.demo.demo import run_demo
    from storage.backends.place import home_expanded

    return run_demo(home_expanded(arguments.folder).absolute())


def _plan(arguments: argparse.Namespace) -> int:
    from jobs.plan.plan import PlanOptions, plan_record
    from jobs.plan.text import plan_text
    from jobs.spec.spec import load_spec

    options = PlanOptions(arguments.measure, arguments.rows_per_second, arguments.prices)
    record = plan_record(load_spec(arguments.spec), options)
    print(json.dumps(record, indent=2) if arguments.json else plan_text(record))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from jobs.status import status_record, status_text

    record = status_record(_open(arguments.store))
    print(json.dumps(record, indent=2) if arguments.json else status_text(record))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from jobs.verify import run_verify

    return run_verify(arguments)


def _query(arguments: argparse.Namespace) -> int:
    from jobs.cli.query import run_query

    return run_query(_open(arguments.store), arguments)


def _report(arguments: argparse.Namespace) -> int:
    from jobs.report import write_report

    store = _open(arguments.store)
    print(f"wrote {write_report(store, arguments.out)}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from jobs.bench.lrb import run_lrb

    return run_lrb(arguments, lambda text: print(text, flush=True))


def _submit(arguments: argparse.Namespace) -> int:
    from jobs.spec.spec import load_spec
    from jobs.submit.submit import follow, submit

    spec = load_spec(arguments.spec).with_env(arguments.env)
    job = submit(spec, stage=arguments.stage, job_id=arguments.id, address=arguments.address, grow=arguments.grow)
    print(f"submitted {job}; see it with: granary logs {job}", flush=True)
    return follow(job, arguments.address) if arguments.follow else 0


def _jobs(arguments: argparse.Namespace) -> int:
    from jobs.submit.submit import jobs_record, jobs_text

    record = jobs_record(arguments.address)
    print(json.dumps(record, indent=2) if arguments.json else jobs_text(record))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from jobs.submit.submit import follow, logs

    if arguments.follow:
        return follow(arguments.job, arguments.address)
    print(logs(arguments.job, arguments.address), end="")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from jobs.submit.submit import stop

    print(stop(arguments.job, arguments.address))
    return 0


class _Version(argparse.Action):
    """`--version`, which reads the version only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        from workers.versions import versions

        print(f"granary {versions()['granary-activations']}")
        parser.exit()


def _count(text: str) -> int:
    """An argument that is a number of things."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if (number := _count(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def _open(place: str) -> Any:
    """Open the store at a path, or the one that a spec file names."""
    from storage.store import open_store

    if place.endswith((".yaml", ".yml")):
        from jobs.spec.spec import load_spec

        return open_store(load_spec(place).store)
    return open_store(place)


if __name__ == "__main__":
    sys.exit(main())
