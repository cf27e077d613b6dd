"""DICOM series: real ones against pydicom's pixels, and every series that is no grid refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from unetrkit.data.check import check
from unetrkit.data.datalist import read_dataset
from unetrkit.data.fingerprint import make_plan
from unetrkit.data.geometry import orientation, reorient, same_grid, spacing_of
from unetrkit.data.prepare import prepare
from unetrkit.data.store import Store
from unetrkit.data.volume import read_header, read_image, read_label, write_label
from unetrkit.errors import UserError

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("SimpleITK")


def write_series(folder: Path, count: int = 6, **tags) -> list[Path]:
    """An axial CT of 12 columns, 10 rows, 0.8 x 0.6 x 3 mm; HU = slice * 100 + row * 10 + column - 1024."""
    folder.mkdir(exist_ok=True)
    paths = []
    for k in range(count):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(k), str(tags)])
        one = pydicom.Dataset()
        one.file_meta = meta
        one.SOPClassUID, one.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        one.Modality, one.SeriesInstanceUID, one.PatientName = "CT", "1.2.3", "Secret^Name"
        one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = 10, 12, 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.ImagePositionPatient, one.ImageOrientationPatient = (
            [-5.0, -7.0, 100 + 3.0 * k],
            [1, 0, 0, 0, 1, 0],
        )
        one.PixelSpacing, one.SliceThickness = [0.6, 0.8], 3.0  # between rows, between columns
        one.RescaleSlope, one.RescaleIntercept = 1, -1024
        rows, columns = np.mgrid[:10, :12]
        one.PixelData = (k * 100 + rows * 10 + columns).astype("<u2").tobytes()
        for name, value in tags.items():
            setattr(one, name, value(k) if callable(value) else value)
        paths.append(folder / f"IM{(k * 5) % 7:02d}")  # names are no order, and have no suffix
        one.save_as(paths[-1], enforce_file_format=True)
    return paths


def change(path: Path, **tags) -> None:
    one = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(one, name, value)
    one.save_as(path)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read_image([folder])
    assert folder.name in caught.value.message and caught.value.hint
    assert "Secret" not in caught.value.message and "\n" not in caught.value.message


def test_series_is_read_at_its_place(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    (tmp_path / "ct" / "README.txt").write_text("about")
    volume = read_image([tmp_path / "ct"])
    x, y, z = np.mgrid[:12, :10, :6]
    np.testing.assert_array_equal(volume.array[0], z * 100 + y * 10 + x - 1024)
    expected = [[-0.8, 0, 0, 5], [0, -0.6, 0, 7], [0, 0, 3, 100], [0, 0, 0, 1]]
    np.testing.assert_allclose(volume.affine, expected, atol=1e-12)
    header = read_header(tmp_path / "ct")
    assert (header.shape, header.channels, header.dtype) == ((12, 10, 6), 1, np.uint16)
    write_label(
        tmp_path / "label.nii.gz", (volume.array[0] > -700).astype(np.uint8), tmp_path / "ct", {1: "high"}
    )
    label = read_label(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(label.array, volume.array > -700)
    np.testing.assert_allclose(label.affine, volume.affine, rtol=1e-6)


def test_a_series_is_checked_and_prepared_and_redone_where_a_slice_changed(tmp_path: Path) -> None:
    cases = []
    for k, name in enumerate(("a", "b")):
        write_series(tmp_path / name, SeriesInstanceUID=f"1.2.{k}", RescaleIntercept=-1024 - k)
        label = (read_image([tmp_path / name]).array[0] > -700).astype(np.uint8)
        write_label(tmp_path / f"{name}.nii.gz", label, tmp_path / name, {1: "high"})
        cases.append({"image": name, "label": f"{name}.nii.gz"})
    (tmp_path / "list.json").write_text(json.dumps({"modality": "CT", "training": cases}))
    dataset = read_dataset(tmp_path / "list.json")
    assert check(dataset, workers=1).errors == ()
    plan = make_plan(dataset, workers=1)
    assert prepare(dataset, plan, tmp_path / "store", workers=1).redone == 2
    assert prepare(dataset, plan, tmp_path / "store", workers=1).redone == 0
    change(tmp_path / "b" / "IM05", RescaleIntercept=-1000)
    assert prepare(dataset, plan, tmp_path / "store", workers=1).redone == 1
    assert [case.name for case in Store.open(tmp_path / "store").cases] == ["a", "b"]


def test_oblique_series_and_slopes_of_their_own(tmp_path: Path) -> None:
    row, column = np.array([0.8, 0.6, 0]), np.array([0, 0, -1.0])
    normal = np.cross(row, column)
    write_series(
        tmp_path / "mr",
        Modality="MR",
        SOPClassUID=pydicom.uid.MRImageStorage,
        ImageOrientationPatient=[*row, *column],
        ImagePositionPatient=lambda k: (np.array([10, 20, 30]) - 2.5 * k * normal).round(6).tolist(),
        RescaleSlope=lambda k: 1 + k / 2,
        RescaleIntercept=0,
    )
    volume = read_image([tmp_path / "mr"])
    assert spacing_of(volume.affine) == pytest.approx((0.8, 0.6, 2.5))
    x, y, z = np.mgrid[:12, :10, :6]
    k = 5 - z  # slices are stacked along the normal
    np.testing.assert_allclose(volume.array[0], (k * 100 + y * 10 + x) * (1 + k / 2), rtol=1e-6)
    last = np.array([10, 20, 30]) - 2.5 * 5 * normal
    np.testing.assert_allclose(volume.affine[:3, 3], last * (-1, -1, 1), atol=1e-5)


@pytest.mark.parametrize("step", [0.625, 1.25, 3.0])
def test_positions_rounded_to_a_tenth_are_no_false_alarm(tmp_path: Path, step: float) -> None:
    write_series(tmp_path / "ct", count=7, ImagePositionPatient=lambda k: [0, 0, round(step * k + 0.03, 1)])
    assert read_header(tmp_path / "ct").shape == (12, 10, 7)


@pytest.mark.parametrize("gone", [1, 2, 4])
def test_a_missing_slice_is_found(tmp_path: Path, gone: int) -> None:
    paths = write_series(tmp_path / "ct")
    paths[gone].unlink()
    refused(tmp_path / "ct", r"misses 1 slice: 6 mm instead of 3 mm between")


BAD: dict[str, tuple[dict, str]] = {
    "uneven": ({"ImagePositionPatient": lambda k: [0, 0, 3.0 * k + (k > 2)]}, "unevenly spaced slices: 4 mm"),
    "tilted": ({"ImagePositionPatient": lambda k: [0, 0.5 * k, 3.0 * k]}, "tilted gantry: .* 9.46 degrees"),
    "repeated": ({"ImagePositionPatient": lambda k: [0, 0, 3.0 * (k // 2)]}, "two slices at one position"),
    "all at one place": ({"ImagePositionPatient": [0, 0, 0]}, "two slices at one position"),
    "two series": (
        {"SeriesInstanceUID": lambda k: f"1.2.{k % 2}"},
        r"2 DICOM series: CT 1.2.0 \(3 files\); CT 1.2.1",
    ),
    "another modality": ({"Modality": lambda k: "PT" if k else "CT"}, "2 DICOM series"),
    "localizer": (
        {"ImageOrientationPatient": lambda k: [1, 0, 0, 0, 0, -1] if k == 5 else [1, 0, 0, 0, 1, 0]},
        "orientation",
    ),
    "zoomed": ({"PixelSpacing": lambda k: [0.6, 0.8] if k else [0.6, 0.9]}, "another pixel spacing"),
    "colour": ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "colours"),
    "multi-frame": ({"NumberOfFrames": 6}, "multi-frame"),
    "no position": ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
    "two numbers": ({"ImagePositionPatient": [1, 2]}, "no geometry"),
    "not orthogonal": ({"ImageOrientationPatient": [1, 0, 0, 0.5, 1, 0]}, "no geometry"),
    "zero spacing": ({"PixelSpacing": [0, 0]}, "spacing of"),
}


@pytest.mark.parametrize("what", BAD)
def test_series_that_are_no_grid_are_refused(tmp_path: Path, what: str) -> None:
    tags, match = BAD[what]
    write_series(tmp_path / "ct", **tags)
    refused(tmp_path / "ct", match)


def test_slices_of_different_size_are_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "ct")
    change(paths[3], Rows=5, PixelData=b"\0" * 120)
    refused(tmp_path / "ct", "another size")


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "ct")
    content = paths[2].read_bytes()
    for length in (0, 100, 140, 500, len(content) - 200, len(content) - 1):
        paths[2].write_bytes(content[:length])
        refused(tmp_path / "ct", paths[2].name)
    paths[2].write_bytes(content)
    (tmp_path / "ct" / "slice.dcm").write_text("no DICOM")
    refused(tmp_path / "ct", "slice.dcm.* is not a readable DICOM file")


def test_mutated_slices_raise_nothing_but_user_errors(tmp_path: Path) -> None:
    path = write_series(tmp_path / "ct", count=4)[1]
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        mutated = bytearray(content)
        for place in generator.integers(128, len(content) - 240, size=generator.integers(1, 6)):
            mutated[place] = generator.integers(256)
        path.write_bytes(mutated)
        try:
            assert read_image([tmp_path / "ct"]).array.shape[1:3] == (12, 10)
        except UserError as error:
            assert str(tmp_path) in error.message and "\n" not in error.message


def test_folders_without_slices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    write_series(tmp_path / "study" / "a")
    refused(tmp_path / "study", "holds no DICOM slices")
    with pytest.raises(UserError) as caught:
        read_header(tmp_path / "study")
    assert caught.value.hint == "give one of its folders: a"


def test_a_structure_set_among_the_slices_is_passed_over(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "ct")
    one = pydicom.dcmread(paths[0])
    for name in ("Rows", "Columns", "PixelData", "ImagePositionPatient"):
        delattr(one, name)
    one.Modality, one.SeriesInstanceUID = "RTSTRUCT", "9.9"
    one.save_as(tmp_path / "ct" / "structures.dcm")
    assert read_header(tmp_path / "ct").shape == (12, 10, 6)


@pytest.mark.parametrize(
    ("folder", "shape", "axes"),
    [
        ("ct_siemens_j2k/series", (512, 512, 20), "LPS"),
        ("ct_torchio_17", (88, 128, 17), "RAS"),
        ("ct_3slice_with_seg/ct", (512, 512, 3), "LPS"),
        ("mr_tiny_compressed_j2k", (256, 256, 4), "PIR"),
        ("mr_tiny_compressed_rle", (256, 256, 4), "PIR"),
    ],
)
def test_real_series_agree_with_pydicom(shared_data: Path, folder: str, shape, axes: str) -> None:
    path = shared_data / "dicom" / folder
    volume = read_image([path])
    assert volume.array.shape == (1, *shape)
    assert orientation(volume.affine) == axes
    for file in path.iterdir():
        one = pydicom.dcmread(file)
        place = np.linalg.inv(volume.affine) @ [*(np.array(one.ImagePositionPatient) * (-1, -1, 1)), 1]
        np.testing.assert_allclose(place, place.round(), atol=1e-3)
        if not one.file_meta.TransferSyntaxUID.name.startswith("JPEG"):  # pydicom alone cannot decode those
            values = one.pixel_array * float(one.get("RescaleSlope", 1)) + float(
                one.get("RescaleIntercept", 0)
            )
            np.testing.assert_array_equal(volume.array[0, :, :, round(place[2])].T, values)


def test_labels_of_the_real_series_lie_on_it_in_another_order(shared_data: Path) -> None:
    image = read_header(shared_data / "dicom/ct_siemens_j2k/series")
    for name in ("label_btcv13", "label_total117"):
        label = read_label(shared_data / f"dicom/ct_siemens_j2k/{name}.nii.gz")
        assert orientation(label.affine) == "LAS"
        assert same_grid(image.affine, image.shape, label.affine, label.array.shape[1:]) is not None
        turned = reorient(label, image.affine)
        assert same_grid(image.affine, image.shape, turned.affine, turned.array.shape[1:]) is None


def test_the_two_compressions_of_one_series_agree(shared_data: Path) -> None:
    one, two = (read_image([shared_data / f"dicom/mr_tiny_compressed_{kind}"]) for kind in ("j2k", "rle"))
    np.testing.assert_array_equal(one.array, two.array)


def test_a_segmentation_object_is_refused(shared_data: Path) -> None:
    refused(shared_data / "dicom/ct_3slice_with_seg/seg", "holds no DICOM slices")
