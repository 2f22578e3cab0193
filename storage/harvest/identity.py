"""What determines the bytes of a harvest: the table, the model, and how the model computes."""

from collections.abc import Collection
from dataclasses import dataclass

from storage.format.records import Record, differences, digest

BLOCKS = "attention_in_blocks"


@dataclass(frozen=True)
class Computation:
    """How a harvest's model computes, as far as that can change the last bits of a row."""

    batches: str
    """Names the way in which contexts are packed into batches (`pipeline.capture.batches.COMPOSITION`)."""
    batch_tokens: int
    attention: str
    compile: bool
    device: str
    """cpu or cuda."""
    threads_per_worker: int | None
    """None on GPUs."""
    attention_in_blocks: bool = True
    """False where layers were compiled for a processor that emulates bfloat16: they do not attend in blocks then."""

    def to_record(self) -> Record:
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != BLOCKS}
        return record if self.attention_in_blocks else {**record, BLOCKS: False}


@dataclass(frozen=True)
class HarvestIdentity:
    """The identity of a harvest; it is named by the digest of `record`.

    The record is kept as it was read, so that what another version added to it still counts.
    """

    record: Record

    @classmethod
    def of(
        cls,
        *,
        corpus_digest: str,
        tokenizer_digest: str,
        fingerprint: str,
        dtype: str,
        rows_per_unit: int,
        computation: Computation,
    ) -> "HarvestIdentity":
        """The identity of a harvest, but for its sites. `fingerprint`, `dtype`: the model, and what it computes in."""
        return cls(
            {
                "corpus_digest": corpus_digest,
                "tokenizer_digest": tokenizer_digest,
                "model": {"fingerprint": fingerprint, "dtype": dtype},
                "rows_per_unit": rows_per_unit,
                "harvest": computation.to_record(),
            }
        )

    @classmethod
    def made_up(cls, rows_per_unit: int, **known: object) -> "HarvestIdentity":
        """The identity of a harvest that no model made, for plans and tests."""
        return cls({"rows_per_unit": rows_per_unit, **known})

    def with_sites(self, sites: Record) -> "HarvestIdentity":
        """The same with sites, and the type that each is stored as."""
        return HarvestIdentity({**self.record, "sites": sites})

    @property
    def digest(self) -> str:
        return digest(self.record)[:16]

    @property
    def rows_per_unit(self) -> int:
        return int(self.record["rows_per_unit"])

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return str(self.record["model"]["fingerprint"])

    @property
    def dtype(self) -> str | None:
        """What the model computes in; None of a harvest that no model made."""
        dtype: str | None = self.record.get("model", {}).get("dtype")
        return dtype

    @property
    def computation(self) -> Computation | None:
        """How the model computes; None of a harvest that no model made, or another version of Granary did."""
        record, known = self.record.get("harvest", {}), Computation.__dataclass_fields__
        if not known.keys() - {BLOCKS} <= record.keys():
            return None
        return Computation(**{name: value for name, value in record.items() if name in known})

    @property
    def computed(self) -> Record:
        """What the record says of how rows were computed, to be shown."""
        return {"dtype": self.dtype, **self.record.get("harvest", {})}

    @property
    def model(self) -> Record:
        """The model's fingerprint and what it computes in, as results record them."""
        return dict(self.record["model"])

    @property
    def of_model(self) -> Record:
        """What the groups of a model's arrays say of it."""
        return {name: self.record[name] for name in ("tokenizer_digest", "model") if name in self.record}

    def differences(self, other: "HarvestIdentity", by_machine: Collection[str]) -> list[str]:
        """Name what differs from what a spec gives, with both values. Sites are not compared, nor what of the
        computation was chosen for a machine."""
        return differences(self._comparable(by_machine), other._comparable(by_machine))

    def _comparable(self, by_machine: Collection[str]) -> Record:
        compared = {k: v for k, v in self.record.items() if k != "sites"}
        if "harvest" in compared:
            compared["harvest"] = {k: v for k, v in compared["harvest"].items() if k not in by_machine}
        return compared
