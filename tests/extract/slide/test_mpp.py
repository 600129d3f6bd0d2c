# ruff: noqa: E501  one source, one line
"""The chain of µm per px: order, plausibility, what is told and what is passed over."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhim.configs.schema import TileConfig
from mhim.extract.slide.mpp import resolve

DEFAULT = TileConfig()
OME = '<?xml version="1.0"?><OME><Image><Pixels ID="P" PhysicalSizeX="{x}" PhysicalSizeXUnit="{u}" SizeX="9"/></Image></OME>'

SOURCES = [
    ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, (0.25, 0.26), "openslide.mpp"),
    ({"aperio.MPP": "0.4990"}, (0.499, 0.499), "aperio.MPP"),
    ({"philips.DICOM_PIXEL_SPACING": '"0.00022" "0.00025"'}, (0.25, 0.22), "philips.DICOM_PIXEL_SPACING"),
    ({"ventana.ScanRes": "0.4645"}, (0.4645, 0.4645), "ventana.ScanRes"),
    (
        {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "20000", "tiff.YResolution": "10000"},
        (0.5, 1.0),
        "TIFF",
    ),
    ({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}, (0.5, 0.5), "TIFF"),
    ({"tiff.ImageDescription": OME.format(x="0.3", u="µm")}, (0.3, 0.3), "OME-XML"),
    ({"openslide.comment": OME.format(x="300", u="nm")}, (0.3, 0.3), "OME-XML"),
]


@pytest.mark.parametrize(("properties", "mpp", "source"), SOURCES)
def test_each_source_alone(properties: dict[str, str], mpp: tuple[float, float], source: str) -> None:
    found = resolve(properties, DEFAULT)
    assert found.mpp == pytest.approx(mpp)
    assert found.source.startswith(source)


@pytest.mark.parametrize(
    ("unit", "px_per_unit", "mpp"),
    [("micron", "2", 0.5), ("\\u00B5m", "4", 0.25), ("µm", "4", 0.25), ("um", "4", 0.25), ("microns", "2", 0.5),
     ("nm", "0.002", 0.5), ("mm", "4000", 0.25), ("cm", "20000", 0.5), ("inch", "50800", 0.5), ("pixel", "1", None),
     ("", "2", None)],
)  # fmt: skip
def test_the_unit_that_imagej_means(unit: str, px_per_unit: str, mpp: float | None) -> None:
    """It writes px per its own unit into the tags, whose unit it leaves at none or, by other writers' default, inch."""
    said = f"ImageJ=1.54f\nimages=1\nunit={unit}\nloop=false\n"
    for tag in ("none", "inch"):
        found = resolve(
            {"tiff.ImageDescription": said, "tiff.ResolutionUnit": tag, "tiff.XResolution": px_per_unit}, DEFAULT
        )
        assert found.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))


def test_the_order_of_the_chain() -> None:
    everything: dict[str, str] = {}
    for properties, _, _ in SOURCES:
        everything |= properties
    told = TileConfig(mpp_of_slides=0.7)
    assert resolve(everything, told, 0.9).source == "manifest"
    assert resolve(everything, told).mpp == (0.7, 0.7)
    for key, start in (("openslide.mpp-x", "openslide"), ("aperio.MPP", "aperio"), ("philips.DICOM_PIXEL_SPACING", "phil"),
                       ("ventana.ScanRes", "ventana"), ("tiff.XResolution", "TIFF"), ("tiff.ImageDescription", "OME")):  # fmt: skip
        assert resolve(everything, DEFAULT).source.startswith(start)
        everything = {k: v for k, v in everything.items() if k != key and k != key.replace("-x", "-y")}


@pytest.mark.parametrize("text", ["0", "-0.25", "nan", "inf", "", "a quarter", "352.8", "0.0001"])
def test_a_senseless_value_is_passed_over_with_a_note(text: str) -> None:
    found = resolve({"openslide.mpp-x": text, "openslide.mpp-y": text, "ventana.ScanRes": "0.5"}, DEFAULT)
    assert found.source == "ventana.ScanRes"
    assert "passed over" in found.notes[0]
    assert resolve({"openslide.mpp-x": text}, DEFAULT).mpp is None


def test_a_screen_resolution_is_no_mpp() -> None:
    assert (
        resolve({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "72", "tiff.YResolution": "72"}, DEFAULT).mpp
        is None
    )
    assert resolve({"tiff.ResolutionUnit": "none", "tiff.XResolution": "20000"}, DEFAULT).mpp is None


def test_power_only_on_request() -> None:
    properties = {"openslide.objective-power": "40"}
    assert resolve(properties, DEFAULT).mpp is None
    found = resolve(properties, TileConfig(assume_mpp_from_power=True))
    assert found.mpp == (0.25, 0.25)
    assert "assumed" in found.source


def test_disagreement_of_manifest_and_file_is_noted() -> None:
    found = resolve({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, DEFAULT, 0.5)
    assert found.mpp == (0.5, 0.5)
    assert "0.25" in found.notes[0]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_senseless_manifest_value_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="manifest"):
        resolve({}, DEFAULT, value)


@given(st.dictionaries(st.sampled_from([k for p, _, _ in SOURCES for k in p]), st.text(max_size=40)))
def test_any_text_gives_a_plausible_mpp_or_none(properties: dict[str, str]) -> None:
    found = resolve(properties, DEFAULT)
    assert found.mpp is None or all(0.05 <= v <= 20 for v in found.mpp)
