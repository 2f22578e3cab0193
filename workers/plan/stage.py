"""The plan: from a spec's corpus to the store's table of rows.

Small corpora are planned in this process, large ones as Ray tasks: by the same functions (`table_plan`), with the same
result.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.corpus.chats.template_arguments import check_arguments
from pipeline.corpus.formats.open import check_new_names
from pipeline.corpus.sources.retry import Unread
from pipeline.corpus.token_labels import LabelValues
from pipeline.model.describe import ModelInfo
from storage.backends.place import Place, open_place
from storage.format.layout import StoreLayout
from storage.make.create import TableFiles, corpus_digest, new_store, refuse_if_taken
from storage.make.grow import grown_table, settle
from storage.store import Store, open_store
from storage.table.root import CorpusInfo
from workers.cluster.tasks import Tasks
from workers.plan.calls import Cuts
from workers.plan.match import growth_of, refuse_growth, source_words
from workers.plan.source import Source, columns_of, open_source
from workers.plan.table_plan import Progress, TablePlan, plan_table, planning_ended
from workers.plan.write_table import write_table
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings
from workers.versions import versions


def plan_rows(
    source: Source,
    progress: Progress,
    tasks: Tasks,
    cuts: Cuts | None = None,
    roles: Sequence[str] = (),
    labels: LabelValues | None = None,
    is_new: bool = True,
) -> TablePlan:
    """Read, tokenise and lay out the corpus; write nothing. `roles`, `labels`: see `plan_table`. `is_new`: not for a
    store that there is, which may have been made when names of columns and arguments were not checked. Raises
    InputError."""
    recipe, rows = source.recipe(), source.settings.rows
    if is_new:
        check_new_names(columns_of(source.settings))
        if source.settings.messages is not None:
            check_arguments(source.tokenizer, source.settings.template_arguments)
    try:
        source.check_first_records()
    except Unread as error:
        raise planning_ended(error, 0, rows) from error
    return plan_table(source.corpora, recipe, rows, tasks, progress, cuts or Cuts(), roles, labels)


def ensure_store(
    url: str | Path,
    corpus: CorpusSettings,
    model: ModelSettings,
    info: ModelInfo,
    progress: Progress,
    check: Callable[[int], None] = lambda num_rows: None,
    connect: Callable[[], None] | None = None,
    grow: bool = False,
) -> tuple[Store, bool]:
    """Open the store at `url` if its table is the one the spec describes, else make it, or with `grow` append to it
    what is missing. Return whether anything was written.

    `info` is what `describe_model` says of the model: asked once for a run, as a revision on the hub may be another
    commit a second later. `check` is given the number of rows that are new before anything is written; `connect` brings
    up Ray, for a large corpus. Raises StoreMismatch, showing both values, when the store there has another table.
    """
    info.check_context(corpus.context)
    source = open_source(corpus, model, info.vocabulary, info.revision)
    place = open_place(url)
    if StoreLayout(place).root_record.exists():
        if grow:
            settle(place)
        store = open_store(place)
        source = source.as_in(store)
        identity = source.identity_beside(store.info.plan)
        growth = growth_of(store, identity)
        if growth is None:
            return store, False
        if not grow:
            raise refuse_growth(store, identity, growth)
        return _grow(store, source, progress, check, source.tasks(connect)), True
    refuse_if_taken(place)  # before the corpus is read, which can take hours
    tasks = source.tasks(connect)
    plan = plan_rows(source, progress, tasks)
    check(plan.sizes.rows)
    return write_plan(place, source, plan, tasks), True


def write_plan(place: Place, source: Source, plan: TablePlan, tasks: Tasks) -> Store:
    """Write planned rows as a new store."""
    unit_size = source.settings.unit_size(plan.sizes.rows)
    with new_store(place, source.identity) as draft:
        return draft.finish(_write(source, plan, draft.begin_table(plan.table_sizes), tasks, unit_size))


def _grow(store: Store, source: Source, progress: Progress, check: Callable[[int], None], tasks: Tasks) -> Store:
    """Plan the whole table again, and put it in place of the store's, of which it must be a continuation."""
    plan = plan_rows(source, progress, tasks, roles=store.info.roles, labels=store.info.values_of_rows, is_new=False)
    check(plan.sizes.rows - store.num_rows)
    with grown_table(store) as draft:
        files = draft.begin_table(plan.table_sizes)
        return draft.finish(_write(source, plan, files, tasks, store.info.rows_per_unit))


def _write(source: Source, plan: TablePlan, files: TableFiles, tasks: Tasks, unit_size: int) -> CorpusInfo:
    """Write a table; return what the root record is to say of it."""
    settings, sizes = source.settings, plan.sizes
    digests = write_table(plan, files, tasks)
    files.write_tokenizer(lambda folder: source.tokenizer.save_pretrained(folder))
    segments = [plan.segment(number) for number in range(len(source.corpora))]
    return CorpusInfo(
        num_rows=sizes.rows,
        num_contexts=sizes.contexts,
        num_context_tokens=sizes.context_tokens,
        num_documents=sizes.documents,
        rows_per_unit=unit_size,
        context=settings.context,
        skip_first=settings.skip_first,
        held_out_start=held_out_start(sizes.rows, unit_size, settings.holdout),
        labels=[label for label in settings.labels if label not in plan.label_names],
        roles=plan.role_names,
        corpus_digest=corpus_digest(digests),
        tokenizer_digest=source.identity["tokenizer"],
        plan=source.identity,
        skipped=plan.skipped.to_record(),
        made_with={**versions(), **source.made_with},
        segments=[
            {"rows": segment.rows, "documents": segment.documents, "of": source_words(of)}
            for segment, of in zip(segments, source.identity["source"], strict=True)
        ],
        row_labels=[{"label": label, "values": list(values)} for label, values in plan.label_names.items()],
    )


def held_out_start(num_rows: int, rows_per_unit: int, share: float) -> int:
    """The first held-out row: a unit boundary that leaves at least `share` of the rows behind it (the last unit may be
    short), and at least one unit before it. `num_rows` when nothing is held out, or all rows are in one unit."""
    if share == 0 or num_rows <= rows_per_unit:
        return num_rows
    return max(1, int(num_rows * (1 - share)) // rows_per_unit) * rows_per_unit
