"""What the rows of one patient make together: one site, and slides of one kind of tissue.

In: rows of a labels table, or the slides of patients. Out: values of the patient, and what has to be told. Knows no
features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mhim.pipeline.cohort import tcga
from mhim.pipeline.cohort.labels.rows import CohortError, Row, counted, some


def joint_sites(rows: Sequence[Row], split_by: str) -> tuple[dict[str, str], list[str]]:
    """patient -> site, for splits, and what is to be told. Sites that share a patient are one site.

    Raises CohortError where a patient is of two sites and nothing joins them (`split_by` is not `site`)."""
    of: dict[str, set[str]] = {}
    for row in rows:
        of.setdefault(row.patient, set()).update({row.site} if row.site else ())
    several = {p: sorted(sites) for p, sites in of.items() if len(sites) > 1}
    if several and split_by != "site":
        patient, sites = next(iter(several.items()))
        raise CohortError(
            f"column site: patient {patient!r} is of {' and '.join(sites)} ({len(several)} such): "
            "write one site, drop the column, or give --set train.split_by=site, which keeps sites that "
            "share a patient on one side"
        )
    home = {s: s for sites in of.values() for s in sites}  # a site -> the group it has gone to
    for sites in several.values():
        into = min(home[s] for s in sites)
        gone = {home[s] for s in sites}
        home.update({s: into for s, group in home.items() if group in gone})
    members: dict[str, list[str]] = {}
    for site, group in sorted(home.items()):
        members.setdefault(group, []).append(site)
    called = {s: "+".join(members[group]) for s, group in home.items()}
    joined = ["+".join(m) for _, m in sorted(members.items()) if len(m) > 1]
    told = f"{len(several)} patients have slides of two or more sites: {', '.join(joined)} stay together"
    return {p: called[min(sites)] for p, sites in of.items() if sites}, [told] if several else []


def mixed_tissue(patients: Mapping[str, Sequence[str]]) -> list[str]:
    """TCGA slides of normal tissue that lie in one bag with a tumour's: a line to be told. patients: name -> slides."""
    mixed = []
    for slides in patients.values():
        normal = [s for s in slides if tcga.normal_tissue(s)]
        if normal and any(tcga.normal_tissue(s) is False for s in slides):
            mixed += normal
    told = f"{len(mixed)} slides of normal tissue (TCGA sample type 11 or so) lie in the bags of tumours: {some(mixed)}"
    return [f"{told}; leave their rows out if they are not meant"] if mixed else []


def each_alone(slides: Sequence[tuple[str, object]]) -> list[str]:
    """What is to be told where each slide is a bag (train.bag=slide). slides: patient and target of each."""
    found: dict[str, set[object]] = {}
    for patient, target in slides:
        found.setdefault(patient, set()).add(target)
    several = sum(len(targets) > 1 for targets in found.values())
    return [
        f"train.bag=slide: each of {counted(len(slides), 'slide')} is a bag; the {counted(len(found), 'patient')} stay "
        f"whole in folds, validation and intervals; {several} of them have slides of different labels"
    ]
