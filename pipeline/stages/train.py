"""Features to models, as a resumable stage."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhim.configs import lookup
from mhim.configs.schema import Config, before, fingerprint_fields
from mhim.configs.schema_tables import MISSING
from mhim.mil import splits
from mhim.mil.splits import Fold
from mhim.pipeline.cohort.patient_tables import join
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.cohort.patients import Dataset, digest_of
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.resume.runner import make_one, open_claims
from mhim.pipeline.resume.stage import CHECKPOINTS, Item, Made, Stage, State, is_made
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.training import kept, pretrained

if TYPE_CHECKING:
    from mhim.pipeline.training.card import Card
    from mhim.pipeline.training.fold import Job


@dataclass
class Train(Stage):
    """Features to models: `runs/<name>/fold_<k>/`, one item per (grid cell, seed, fold), baselines of MHIM first.

    With `train.fusion` these are the fused ones, after `slide/`, its inner folds, and `tables/<name>/`."""

    work: layout.Work
    config: Config
    run: str
    data: Dataset
    folds: list[Fold]
    tables: Mapping[str, PatientTable] = field(default_factory=dict)
    begun: dict[str, Any] = field(default_factory=dict, init=False)  # settings that are as before there were such
    name = "train"

    def __post_init__(self) -> None:
        given = self.config.train.model_params
        self.config = self._as_begun()
        self.begun = {k: v for k, v in self.config.train.model_params.items() if k not in given}

    def told(self) -> list[str]:
        """What a person is told before it begins."""
        lines = [
            f"{self.run} goes on as it was begun: train.model_params.{name} is {json.dumps(value)}, which is what was "
            "done before there was that setting. Another --name takes the default; with --replace what is set by name "
            "counts"
            for name, value in self.begun.items()
        ]
        taught = [job for job in self._own_jobs() if job.teacher and self.config.train.fusion == "none"]
        few = [n for job in taught if kept.by_few(job.config, n := len(self.data.owners(job.fold.val)))]
        if few:
            between = f"{min(few)} to {max(few)}" if min(few) < max(few) else f"{min(few)}"
            lines.append(
                f"{self.run}: in a fold {between} validation patients choose between the model and its plain model, "
                "which are few: train.choice=inner asks the whole training part too, for about "
                f"{self.config.train.choice_folds + 1} times the trainings"
            )
        return lines

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.run(self.run)

    def _jobs(self) -> list[Job]:
        from mhim.pipeline.training import fused, plan

        if self.config.train.fusion == "none":
            return plan.jobs(self.config.train, self.folds)
        return fused.jobs(self.config.train, self.folds, self.data, tuple(self.tables))

    def _as_begun(self) -> Config:
        """The settings, with what a model did before it had a setting (`configs.base.changed`) where the run was begun
        by then: the same command goes on as it began. What is set by name stays."""
        train = self.config.train
        given, module = train.model_params, lookup.find("mhim.mil.models", train.model)
        every = before(getattr(module, "Params", lookup.NoParams))
        once = {name: value for name, value in every.items() if name not in given and name not in train.grid}
        for one in self._own_jobs() if once else ():
            found = seals.look(self.root / one.cell / one.name)
            recorded = found.settings.get("train.model_params") if found else None
            if isinstance(recorded, dict) and found and found.settings.get("train.model") == train.model:
                first = {k: v for k, v in once.items() if k not in recorded}
                return self._with(first) if first else self.config
        if once and (self.root / CHECKPOINTS).is_dir():  # nothing is finished, but perhaps something was begun
            then = replace(self, config=self._with(once))
            for item in map(then.item, then._own_jobs()):
                if (self.root / CHECKPOINTS / item.key / layout.fingerprint(then.fields(item))).is_dir():
                    return then.config
        return self.config

    def _own_jobs(self) -> list[Job]:
        """The trainings of the model that the settings name, those that others are made from too."""
        return [one for job in self._jobs() for one in (job, *job.parts) if not one.part]

    def _with(self, params: dict[str, Any]) -> Config:
        whole = {**self.config.train.model_params, **params}
        return self.config.model_copy(update={"train": self.config.train.model_copy(update={"model_params": whole})})

    def items(self) -> list[Item]:
        from mhim.pipeline.training import inner

        every = self._jobs()
        if self.config.train.fusion == "none":
            asked = [inner.with_evidence(job, self.data) for job in every]
            every = [one for job in asked for one in (*job.evidence, job)]
        teachers = {job.teacher.cell + job.teacher.name: job.teacher for job in every if job.teacher}
        jobs = (*teachers.values(), *every)
        for config in {repr(job.config): job.config for job in jobs if not job.part}.values():
            pretrained.check(config, self.data.facts)
        return [self.item(job) for job in jobs]

    def item(self, job: Job) -> Item:
        """The item of one training. Its inputs say which patients, targets and features it reads."""
        known = self.data.by_id()
        sides = {s: [known[p] for p in getattr(job.fold, s)] for s in ("train", "val", "test")}
        inputs: dict[str, Any] = {s: digest_of(patients) for s, patients in sides.items()}
        inputs |= {"seed": job.seed, "split": job.split_hash} | fingerprints.flat("features", self.data.facts)
        if self.data.classes:  # targets are numbers: the names are facts of their own
            inputs["classes"] = list(self.data.classes)
        if len(self.data.outcomes) > 1:
            inputs["targets"] = [[o.name, o.kind, *o.classes] for o in self.data.outcomes]
        if not job.part and any(o.kind == "ordinal" for o in self.data.outcomes):
            inputs["ordinal"] = job.config.ordinal  # said also where it is the default, which once was another
        if job.teacher:
            inputs["teacher"] = self._mark(self.item(job.teacher))
        if job.teacher and not job.part and kept.weighs(job.config):
            inputs["choice"] = kept.rule_of(job.config)
            inputs |= {"evidence": [self._mark(self.item(e)) for e in job.evidence]} if job.evidence else {}
        if job.part == "chosen":
            inputs["draws"] = [self._mark(self.item(part)) for part in job.parts]
        elif job.part:
            inputs |= self._of_fusion(job)
        else:
            inputs |= pretrained.inputs(job.config)
        return Item(f"{job.cell}/{job.name}" if job.cell else job.name, self.root / job.cell / job.name, inputs, job)

    def _of_fusion(self, job: Job) -> dict[str, Any]:
        """What else a table's or a fused training is made from."""
        if job.part == "joint":
            found = fingerprints.flat("joint", fingerprints.of_joint(job.config))
            return found | fingerprints.flat("tables", {n: self._of_table(n) for n in sorted(self.tables)})
        found = {"inner": splits.digest(job.inner)}
        if job.part == "table":
            name = job.cell.rsplit("/", 1)[-1]
            own = self._of_table(name)
            own |= {"task": fingerprints.of_task(job.config), "by_groups": name in job.config.fusion_groups}
            return found | fingerprints.flat("table", own)
        found |= fingerprints.flat("fusion", fingerprints.of_fusion(job.config))
        return found | {"parts": [self._mark(self.item(part)) for part in job.parts]}

    def _of_table(self, name: str) -> dict[str, Any]:
        """What a table's columns are fitted from, and how."""
        everyone, config = [p.id for p in self.data.patients], self.config.tables
        own = {k: getattr(config, k) for k in ("impute", "indicators", "smallest_group")}
        own |= {"select": config.select.get(name, 0), "rows": self.tables[name].fingerprint(everyone)}
        if config.missing != MISSING:  # kept with the model, by which new patients' cells are read
            own["missing"] = sorted({m.casefold() for m in config.missing})
        return own

    def settings(self) -> dict[str, Any]:
        return fingerprints.flat("train", fingerprint_fields(self.config.train))

    def together(self) -> dict[str, Any]:
        one = {"input.patients": digest_of(self.data.patients), "input.split": splits.digest(self.folds)}
        return self.settings() | one | {f"features.{k}": v for k, v in self.data.facts.items()}

    def begin(self) -> None:
        from mhim.pipeline.results import known
        from mhim.pipeline.training import plan

        known.describe(self.work, self.root, self.data)
        plan.describe(self.root, self.config, self.folds, self.data.made, self.data.owner)
        if self.tables:
            join.describe(self.root, self.tables)

    def recorded(self) -> list[str]:
        """The run's record of its patients, by which those that it knows are no strangers."""
        from mhim.pipeline.results import known

        wrong = known.damaged(self.root, [item.output for item in self.items()])
        if not wrong:
            return []
        self.begin()
        return [f"{self.root / known.PATIENTS} was damaged ({wrong}) and is written anew"]

    def fields(self, item: Item) -> dict[str, Any]:
        """Those of the item's own settings: a cell of a grid equals the same training made alone."""
        inputs = {f"input.{k}": v for k, v in item.inputs.items()}
        own = {} if item.data.part else fingerprints.training(item.data.config)
        return {"stage": self.name, "format": layout.FORMAT, **own, **inputs}

    def _mark(self, teacher: Item) -> str:
        """The fingerprint of a baseline: as recorded where it is made, also by version 0.1, or as it will be."""
        if is_made(self, teacher):
            return str(reading.read_attrs(teacher.output).get("fingerprint"))
        return layout.fingerprint(self.fields(teacher))

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from mhim.pipeline.training import bundle, draws, fold, inner

        twin = seals.twin(self.work.runs, layout.fingerprint(self.fields(item)), item.output)
        if twin is not None:  # the same training in another run: a plain model that serves as a teacher, say
            shutil.copytree(twin, out, ignore=shutil.ignore_patterns(layout.SEAL))
            run = twin.relative_to(self.work.runs).parts[0]  # and not which fold: what is told of many is told once
            return Made(notes=(f"taken from the run {run}, where it is the same training",))
        job: Job = item.data
        if job.part == "chosen":
            return Made(notes=self._make_chosen(job, out))
        if job.part:
            return Made(notes=self._make_of_fusion(job, out, partial))
        at = self._made(self.item(job.teacher)) if job.teacher else None
        teacher = bundle.read(at) if at else None
        given = item.inputs.get("pretrained")
        data = draws.without_others(self.data, job.fold)
        of_inner = [tuple(self._made(self.item(j)) for j in (e.teacher, e) if j) for e in job.evidence]
        evidence = inner.pairs([(plain, student) for plain, student in of_inner])
        return Made(notes=fold.train_fold(job, data, teacher, out, partial, self.root, given, at, evidence))

    def _make_chosen(self, job: Job, out: Path) -> tuple[str, ...]:
        """Choose between the draws, then read the test patients."""
        from mhim.pipeline.training import bundle, draws

        cards: list[Card | None] = []
        for part in job.parts:
            try:
                cards.append(bundle.card_of(self._made(self.item(part))))
            except layout.StoreError:  # told where it failed; the others are left
                cards.append(None)
        choice = draws.choose(cards)
        chosen = draws.of_seed(job.parts[choice.number], job.seed)
        return draws.open_fold(job, choice, self.data, self._made(self.item(chosen)), out)

    def _make_of_fusion(self, job: Job, out: Path, partial: Path) -> tuple[str, ...]:
        from mhim.pipeline.training import fused, joint

        if job.part == "joint":
            return joint.train(job, self.data, self.tables, self.config.tables, out, partial, self.root)

        if job.part == "table":
            table = self.tables[job.cell.rsplit("/", 1)[-1]]
            return fused.train_table(job, self.data, table, self.config.tables, out)
        made = [self._made(self.item(part)) for part in job.parts]
        return fused.train_fused(job, self.data, self.tables, made, out)

    def _made(self, teacher: Item) -> Path:
        """The baseline's (or part's) folder; if it is missing, made here or awaited. Raises StoreError if it fails."""
        with open_claims(self, self.config.cluster.lease_s) as claims:
            while (outcome := make_one(self, teacher, claims)).state is State.CLAIMED:
                time.sleep(0.5)
        if outcome.state is State.FAILED:
            raise layout.StoreError(f"{teacher.key}, which it is made from, failed: {outcome.message}")
        return teacher.output
