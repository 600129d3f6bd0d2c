"""One RGB picture, or a refusal that names the planes: never the first of several without a word."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from mhim.configs.schema import TileConfig
from mhim.extract import SeveralPlanes, UnreadableSlide
from mhim.extract.slide.channels import of_properties
from mhim.extract.slide.slide import open_slide
from mhim.extract.tiles.tiling import tile_slide
from tests.extract.dicoms import write_instance
from tests.extract.omes import RGB_NAMES, ome_xml, write_ome
from tests.extract.slides import MPP, tissue_rgb, write_svs

PICTURE = tissue_rgb(512, 768)
RED, GREEN, BLUE = (np.ascontiguousarray(PICTURE[..., c]) for c in range(3))
THREE = {"SizeC": 3}
BRIGHT = [{"Name": f"Channel {c}", "SamplesPerPixel": 1, "ContrastMethod": "Brightfield"} for c in "abc"]
TILED = {"tile": (256, 256), "compression": "zlib", "metadata": None}


def named(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"Name": n, "SamplesPerPixel": 1, **more} for n in names]


def pages(path: Path, planes: list[np.ndarray], names: list[str] | None = None, **options: Any) -> Path:
    """Plain TIFF pages of which nothing, or the tag PageName, says what they are."""
    with tifffile.TiffWriter(path) as out:
        for n, plane in enumerate(planes):
            tags = [(285, 2, 0, names[n], False)] if names else []
            kind = "rgb" if plane.ndim == 3 else "minisblack"
            out.write(plane, extratags=tags, contiguous=False, **{"photometric": kind, **TILED, **options})
    return path


def imagej(path: Path, planes: np.ndarray, axes: str, **metadata: Any) -> Path:
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": axes, **metadata})
    return path


def colours(*numbers: int) -> list[dict[str, Any]]:
    return [{**c, "Color": n} for c, n in zip(BRIGHT, numbers, strict=True)]


BGR = [BLUE, GREEN, RED]
PLANES = [RED, GREEN, BLUE]
SEPARATE = np.moveaxis(PICTURE, 2, 0).copy()
BLUE_GREEN_RED = (0x0000FFFF, 0x00FF00FF, 0xFF0000FF - (1 << 32))  # as OME-XML writes colours: RGBA, signed
WHERE = "".join(f'<TiffData FirstC="{c}" IFD="{2 - c}" PlaneCount="1"/>' for c in range(3))
SAME: dict[str, Callable[[Path], Path]] = {
    "names": lambda p: write_ome(p, PLANES, THREE, RGB_NAMES),
    "letters, blue first": lambda p: write_ome(p, BGR, THREE, named("B", "G", "R")),
    "pages in another order": lambda p: write_ome(p, BGR, THREE, RGB_NAMES, data=WHERE),
    "brightfield": lambda p: write_ome(p, PLANES, THREE, BRIGHT),
    "brightfield, colours": lambda p: write_ome(p, BGR, THREE, colours(*BLUE_GREEN_RED)),
    "pyramid in sub-directories": lambda p: write_ome(p, PLANES, THREE, RGB_NAMES, levels=3),
    "pyramid in the chain": lambda p: write_ome(p, PLANES, THREE, RGB_NAMES, levels=3, chain=True),
    "strips": lambda p: write_ome(p, PLANES, THREE, RGB_NAMES, tile=None, rowsperstrip=100),
    "samples apart": lambda p: write_ome(p, [SEPARATE], THREE, [{"SamplesPerPixel": 3}], planarconfig="separate"),
    "grey samples with names": lambda p: write_ome(
        p, [SEPARATE], THREE, RGB_NAMES, planarconfig="separate", photometric="minisblack"),
    "no metadata, samples apart": lambda p: pages(p, [SEPARATE], planarconfig="separate"),
    "page names": lambda p: pages(p, BGR, ["Blue", "Green", "Red"]),
    "ImageJ's RGB stack": lambda p: imagej(p, SEPARATE, "ZYX", Labels=["Red", "Green", "Blue"]),
    "one RGB page": lambda p: write_ome(p, [PICTURE], THREE, [{"SamplesPerPixel": 3}]),
    "one RGB page, three channels told": lambda p: write_ome(p, [PICTURE], THREE, named("0", "1", "2")),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_brightfield_planes_equal_their_interleaved_twin(kind: str, tmp_path: Path) -> None:
    path = SAME[kind](tmp_path / "a.tif")
    with open_slide(path, mpp=0.5) as slide:
        assert slide.size_l0 == (768, 512)
        assert slide.bounds_l0 == (0, 0, 768, 512)
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 768, 512), PICTURE)
        if "pyramid" in kind:
            assert slide.level_dimensions == ((768, 512), (384, 256), (192, 128))
            small = PICTURE.reshape(256, 2, 384, 2, 3).mean((1, 3))
            assert np.abs(slide.read_level(100, 60, 1, 200, 90) - small[30:120, 50:250]).max() <= 0.51
    assert not tile_slide(path, TileConfig(tile_px=128, overlay=False), 0.5).empty


WIDE = (PICTURE.astype(np.uint16) * 257)[..., 0]
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "fluorescence": (lambda p: write_ome(p, PLANES, THREE, named("DAPI", "CD3", "CD8")), "DAPI, CD3, CD8"),
    "fluorescence called red, green, blue": (
        lambda p: write_ome(p, PLANES, THREE, named("Red", "Green", "Blue", ContrastMethod="Fluorescence")),
        "3 fluorescence channels"),
    "red, green, blue that emit": (
        lambda p: write_ome(p, PLANES, THREE, named("Red", "Green", "Blue", EmissionWavelength=520)), "fluorescence"),
    "three channels of nobody knows what": (lambda p: write_ome(p, PLANES, THREE, named("a", "b", "c")), "a, b, c"),
    "without a Channel": (lambda p: write_ome(p, PLANES, THREE, []), "3 channels"),
    "two": (lambda p: write_ome(p, PLANES[:2], {"SizeC": 2}, named("Red", "Green")), "2 channels .Red, Green"),
    "four": (lambda p: write_ome(p, [*PLANES, RED], {"SizeC": 4}, named(*"RGBI")), "4 channels .R, G, B, I"),
    "one": (lambda p: write_ome(p, [RED], {}, named("DAPI")), "fluorescence channel .DAPI"),
    "16 bits": (
        lambda p: write_ome(p, [WIDE] * 3, {**THREE, "Type": "uint16"}, RGB_NAMES), "3 channels of 16 bits"),
    "Z-stack of RGB": (
        lambda p: write_ome(p, [PICTURE] * 3, {**THREE, "SizeZ": 3}, [{"SamplesPerPixel": 3}]), "3 focal planes"),
    "Z-stack of channels": (
        lambda p: write_ome(p, PLANES * 2, {**THREE, "SizeZ": 2}, RGB_NAMES), "2 focal planes and 3 channels"),
    "time series": (
        lambda p: write_ome(p, [PICTURE] * 2, {**THREE, "SizeT": 2}, [{"SamplesPerPixel": 3}]), "2 time points"),
    "planes in other files": (
        lambda p: write_ome(p, PLANES, THREE, RGB_NAMES, data="".join(
            f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{c}.tif">x</UUID></TiffData>'
            for c in range(3))), "not all of which are pages of this file"),
    "plain grey pages": (lambda p: pages(p, PLANES), "3 planes of 768 x 512 px"),
    "plain RGB pages": (lambda p: pages(p, [PICTURE, PICTURE[::-1].copy()]), "2 planes of 768 x 512 px"),
    "images of one size in one OME-TIFF": (  # so does tifffile write them, one `write` each
        lambda p: pages(p.with_name("b.ome.tif"), PLANES), "3 planes of 768 x 512 px"),
    "metadata in another file": (
        lambda p: pages(p, PLANES, description='<OME><BinaryOnly MetadataFile="a.ome" UUID="x"/></OME>'), "3 planes"),
    "named pages": (lambda p: pages(p, PLANES, ["DAPI", "CD3", "CD8"]), "DAPI, CD3, CD8"),
    "grey samples without a word": (
        lambda p: pages(p, [SEPARATE], planarconfig="separate", photometric="minisblack"), "3 channels in one page"),
    "ImageJ channels": (lambda p: imagej(p, SEPARATE, "CYX"), "3 channels"),
    "ImageJ slices": (lambda p: imagej(p, SEPARATE, "ZYX"), r"3 focal planes .slices"),
    "ImageJ frames": (lambda p: imagej(p, SEPARATE, "TYX"), r"3 time points"),
    "ImageJ hyperstack": (
        lambda p: imagej(p, np.stack([SEPARATE] * 2), "ZCYX"), r"3 channels and 2 focal planes .slices"),
    "Z-stack of Aperio's": (
        lambda p: pages(p.with_suffix(".svs"), [PICTURE] * 3, description="Aperio Image Library v12\r\n|MPP = 0.5"),
        "3 planes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_planes_that_are_no_rgb_picture_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, words = REFUSED[kind]
    path = make(tmp_path / "a.tif")
    with pytest.raises(UnreadableSlide, match=words) as caught:
        open_slide(path, mpp=0.5)
    assert isinstance(caught.value, SeveralPlanes) or kind == "grey samples without a word"
    assert path.name in str(caught.value)
    assert "one RGB picture" in str(caught.value)


@pytest.mark.parametrize("kind", ["letters, blue first", "pages in another order", "names"])
def test_the_first_page_tells_the_mpp_whichever_is_red(kind: str, tmp_path: Path) -> None:
    with open_slide(SAME[kind](tmp_path / "a.tif")) as slide:
        assert slide.slide_mpp == (MPP, MPP)


def scenes(path: Path, pictures: list[np.ndarray], names: list[str], reduced: bool = False) -> Path:
    """An OME-TIFF of several images, one page each, whose names stand in its XML."""
    images = [
        ome_xml(p.shape, {"SizeC": 3}, [{"SamplesPerPixel": 3}], f'<TiffData IFD="{n}" PlaneCount="1"/>')
        .split("<Image ID", 1)[1].removesuffix("</OME>") for n, p in enumerate(pictures)
    ]  # fmt: skip
    text = "".join(f'<Image Name="{name}" ID{image}' for name, image in zip(names, images, strict=True))
    xml = f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{text}</OME>'
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for n, picture in enumerate(pictures):
            out.write(picture, photometric="rgb", subfiletype=int(reduced and n > 0),
                      description=xml.encode() if n == 0 else None, **TILED)  # fmt: skip
    return path


@pytest.mark.parametrize("order", [1, -1], ids=["large first", "small first"])
def test_scenes_are_told_and_not_dropped(order: int, tmp_path: Path) -> None:
    pictures, names = [PICTURE, tissue_rgb(420, 512, seed=2)][::order], ["left", "right & more"][::order]
    words = [f"{n} of {p.shape[1]} x {p.shape[0]} px" for n, p in zip(names, pictures, strict=True)]
    with pytest.raises(SeveralPlanes, match=r"a\.ome\.tif holds 2 images .*save each as a file of its own") as caught:
        open_slide(scenes(tmp_path / "a.ome.tif", pictures, [n.replace("&", "&amp;") for n in names]))
    assert ", ".join(words) in str(caught.value)


@pytest.mark.parametrize(
    ("second", "name"),
    [(PICTURE[:200, :300], "label image"), (PICTURE[:200, :300], "Macro"), (PICTURE[:100, :120], "x"),
     (PICTURE[::2, ::2], "Series 2")],
    ids=["label", "macro", "far smaller", "a level"],
)  # fmt: skip
def test_labels_and_levels_are_no_scenes(second: np.ndarray, name: str, tmp_path: Path) -> None:
    path = scenes(tmp_path / "a.ome.tif", [PICTURE, np.ascontiguousarray(second)], ["slide", name], reduced=True)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 768, 512), PICTURE)


@pytest.mark.parametrize("options", [TILED, {"compression": "lzw", "rowsperstrip": 37, "metadata": None}], ids=str)
def test_the_finest_page_is_level_0_wherever_it_stands(options: dict[str, Any], tmp_path: Path) -> None:
    """OpenSlide takes the first page for it, and leaves a larger one out."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        for k in (4, 2, 1):
            out.write(np.ascontiguousarray(PICTURE[::k, ::k]), photometric="rgb", subfiletype=int(k > 1),
                      resolution=(20000 / k, 20000 / k), resolutionunit="CENTIMETER", **options)  # fmt: skip
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((768, 512), (384, 256), (192, 128))
        assert slide.slide_mpp == (0.5, 0.5)
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 768, 512), PICTURE)
        np.testing.assert_array_equal(slide.read_level(0, 0, 1, 384, 256), PICTURE[::2, ::2])


def test_a_small_page_before_the_picture_is_not_the_slide(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        for page in (np.ascontiguousarray(PICTURE[:90, :80]), PICTURE):
            out.write(page, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER", **TILED)
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 768, 512), PICTURE)
        assert len(slide.level_dimensions) == 1


def test_a_thumbnail_of_the_same_size_is_no_second_plane(tmp_path: Path) -> None:
    """Small exports of Aperio's have one: in strips, where the picture is in tiles."""
    with tifffile.TiffWriter(tmp_path / "a.svs") as out:
        about = "Aperio Image Library v12.0.15 \r\n768x512|AppMag = 20|MPP = 0.5"
        out.write(PICTURE, photometric="rgb", description=about, **TILED)
        out.write(PICTURE, photometric="rgb", description=about, metadata=None, rowsperstrip=16)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.size_l0 == (768, 512)
    write_svs(tmp_path / "b.svs", PICTURE)
    with open_slide(tmp_path / "b.svs") as slide:
        assert len(slide.level_dimensions) == 2


def czi(path: Path, image: str) -> Path:
    """The segments of a CZI that name its planes, and no pixels."""
    xml = f"<ImageDocument><Metadata><Information><Image>{image}</Image></Information></Metadata>".encode()
    head = b"ZISRAWFILE".ljust(16, b"\0") + struct.pack("<qq", 512, 512) + struct.pack("<ii", 1, 0) + bytes(52)
    head = head[:92] + struct.pack("<q", 544)
    segment = b"ZISRAWMETADATA".ljust(16, b"\0") + struct.pack("<qq", 1024, 1024) + struct.pack("<i", len(xml))
    path.write_bytes(head.ljust(544, b"\0") + segment.ljust(32 + 256, b"\0") + xml)
    return path


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("<SizeC>3</SizeC><Dimensions><Channels><Channel Id='0' Name=\"DAPI\"/><Channel Name=\"FITC\"/></Channels>"
         "</Dimensions>", r"3 channels .DAPI, FITC"),
        ('<SizeC>1</SizeC><Dimensions><Channels><Channel Name="H3342"><IlluminationType>Fluorescence'
         "</IlluminationType></Channel></Channels></Dimensions>", "a fluorescence channel .H3342"),
        ("<SizeZ>7</SizeZ><SizeC>1</SizeC>", "7 focal planes"),
        ("<SizeT>2</SizeT>", "2 time points"),
    ],
)  # fmt: skip
def test_planes_of_a_czi_are_named(image: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableSlide, match=words):
        open_slide(czi(tmp_path / "a.czi", image), mpp=0.5)


@pytest.mark.parametrize("more", [{"TotalPixelMatrixFocalPlanes": 3}, {"NumberOfOpticalPaths": 3}])
def test_planes_of_a_dicom_slide_are_named(more: dict[str, int], tmp_path: Path) -> None:
    kind = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    path = write_instance(tmp_path / "a.dcm", PICTURE, "1.2.3", "1.2.3.1", kind, **more)
    with pytest.raises(UnreadableSlide, match=r"FocalPlanes|optical paths"):
        open_slide(path)


def test_planes_that_properties_count() -> None:
    of_properties("a.mrxs", {"mirax.GENERAL.SLIDE_TYPE": "SLIDE_TYPE_BRIGHTFIELD", "ventana.Z-layers": "1"})
    with pytest.raises(UnreadableSlide, match="9 focal planes"):
        of_properties("a.mrxs", {"mirax.HIERARCHICAL.HIER_2_NAME": "Microscope focus level",
                                 "mirax.HIERARCHICAL.HIER_2_COUNT": "9"})  # fmt: skip
    with pytest.raises(UnreadableSlide, match=r"fluorescence channels .DAPI, CY5"):
        of_properties("a.mrxs", {
            "mirax.GENERAL.SLIDE_TYPE": "SLIDE_TYPE_FLUORESCENCE", "mirax.LAYER_1_LEVEL_0_SECTION.FILTER_NAME": "DAPI",
            "mirax.LAYER_1_LEVEL_1_SECTION.FILTER_NAME": "CY5"})  # fmt: skip
