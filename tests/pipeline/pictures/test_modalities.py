"""The picture of modalities' weights: who counts as having all of them."""

from __future__ import annotations

from matplotlib.figure import Figure

from mhim.mil.fusion.joined import JOINT
from mhim.pipeline.pictures import modalities
from mhim.pipeline.results.fused import Share


def test_a_patient_whom_no_network_was_asked_of_lacks_no_modality() -> None:
    shares = {
        "a": Share({"slide": 0.5, "rna": 0.2, JOINT: 0.3}, {}),
        "b": Share({"slide": 0.6, "rna": 0.4}, {}),
        "c": Share({"slide": 1.0}, {}),
    }
    axes = Figure().subplots()
    modalities._weights(["slide", "rna", JOINT], shares)(axes)
    assert axes.get_xlabel() == "2 patients with all, 1 who lack some (hollow)"
