"""Every good file is read right, every bad one refused by name, and labels lie where their image lies."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from unetrkit.data.volume import files_of, read_header, read_image, read_label, write_label
from unetrkit.errors import MissingExtra, UserError

AFFINE = np.eye(4)
AFFINE[:3, :3] = Rotation.from_euler("xyz", (8, -12, 17), degrees=True).as_matrix() * (-0.7, -1.1, 2.5)
AFFINE[:3, 3] = (-90, 35, -400)
# the good ones among the awkward files; the others must be refused
GOOD = """
bigendian_int16.nii breast1_image.nrrd breast1_label.nrrd crop_constant.nii.gz crop_ct.nii.gz
crop_label.nii.gz crop_label_affine_mismatch.nii.gz crop_label_float_noise.nii.gz
crop_label_shape_mismatch.nii.gz crop_label_unknown_id.nii.gz crop_no_form_codes.nii.gz
crop_qform_only.nii.gz crop_qform_sform_conflict.nii.gz crop_single_slice.nii.gz
crop_single_slice_label.nii.gz crop_trailing_singleton_4d.nii.gz ct_avm_uint8_scl_slope.nii.gz
ct_lung_small.mha ct_lung_small_mask_other_grid.mha ct_oblique_pitch_uint8.nii.gz
epi_oblique_uint8_slope.nii.gz minimal.nii.gz mr.mha nifti2_4d.nii.gz orient_ASR.nii.gz orient_LIP.nii.gz
orient_LPS.nii.gz orient_PIL.nii.gz orient_RAS.nii.gz orient_SAR.nii.gz pair.hdr pair.img
prostate_img.nii.gz prostate_seg_empty.nii.gz prostate_seg_single_slice.nii.gz
prostate_seg_two_labels.nii.gz tiny_7x5x3.nii.gz
""".split()
GOOD.append("crop ct with späces (1).nii.gz")
BAD = {
    "complex64.nii.gz": "complex numbers",
    "crop_float64_nan.nii.gz": "4 of 122880 voxels that are not finite",
    "empty_file.nii.gz": r"is empty \(0 bytes\)",
    "git_lfs_pointer.nii.gz": "Git LFS pointer",
    "not_gzip.nii.gz": "is not compressed",
    "rgb_ct_perfusion.nii.gz": "colours",
    "text_not_image.nii.gz": "web page",
    "truncated.nii.gz": "truncated",
}


def voxels(shape=(7, 5, 4), dtype=np.int16, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def save(path: Path, array: np.ndarray, affine=AFFINE, kind=nib.Nifti1Image, **header) -> Path:
    """A NIfTI file with header fields set to anything."""
    image = kind(array, affine)
    content = bytearray(image.to_bytes())
    size = 540 if kind is nib.Nifti2Image else 348
    fields = kind.header_class(bytes(content[:size]), check=False)
    for name, value in header.items():
        fields[name] = value
    content[:size] = fields.binaryblock
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else content)
    return path


def refused(path: Path, match: str, read: Callable = lambda path: read_image([path])) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    assert path.name in caught.value.message or repr(path.name)[1:-1] in caught.value.message
    assert "\n" not in caught.value.message and not caught.value.message.endswith(".")


def test_the_lists_of_good_and_bad_files_are_complete(shared_data: Path) -> None:
    assert {path.name for path in (shared_data / "awkward").iterdir()} == {*GOOD, *BAD}


@pytest.mark.parametrize("name", GOOD)
def test_awkward_but_good_files_are_read_as_nibabel_and_itk_read_them(shared_data: Path, name: str) -> None:
    path = shared_data / "awkward" / name
    volume, header = read_image([path]), read_header(path)
    if path.suffix in (".nrrd", ".mha"):
        import SimpleITK as sitk

        image = sitk.ReadImage(str(path))
        oracle = sitk.GetArrayFromImage(image).T[..., None]
        corner = [n - 1 for n in image.GetSize()]
        place = np.array(image.TransformIndexToPhysicalPoint(corner)) * (-1, -1, 1)  # LPS -> RAS
        np.testing.assert_allclose(nib.affines.apply_affine(volume.affine, corner), place, atol=1e-9)
    else:
        image = nib.load(path)
        oracle = image.get_fdata()
        oracle = oracle.reshape(*oracle.shape[:3], -1)
        np.testing.assert_array_equal(volume.affine, image.affine)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(np.moveaxis(volume.array, 0, -1), oracle, rtol=1e-7)
    assert (header.channels, *header.shape) == volume.array.shape
    np.testing.assert_array_equal(header.affine, volume.affine)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(shared_data: Path, name: str) -> None:
    refused(shared_data / "awkward" / name, BAD[name])


def test_remarks_on_the_geometry(shared_data: Path) -> None:
    notes = {name: read_header(shared_data / "awkward" / name).notes for name in GOOD}
    assert {name for name in notes if notes[name]} == {
        "crop_no_form_codes.nii.gz",
        "crop_qform_sform_conflict.nii.gz",
        "minimal.nii.gz",
    }
    assert "turned by 15 degrees" in notes["crop_qform_sform_conflict.nii.gz"][0]
    assert "no orientation" in notes["minimal.nii.gz"][0]


def test_every_nifti_and_mgz_of_the_real_scans_is_read(shared_data: Path) -> None:
    folders = ("ct_abdomen_totalseg", "multimodal_sts", "spine_ct_mr", "mr_brain_freesurfer", "ct_unlabelled")
    paths = [path for folder in folders for path in (shared_data / folder).rglob("*.[nm][ig][iz]*")]
    assert len(paths) > 30
    for path in paths:
        header = read_header(path)
        assert header.affine == pytest.approx(nib.load(path).affine), path
        if any(word in path.name for word in ("seg", "mask", "aparc")) or "labels" in path.parent.name:
            assert read_label(path).array.max() == np.asanyarray(nib.load(path).dataobj).max(), path
    volume = read_label(shared_data / "mr_brain_freesurfer/aparc.a2009s+aseg.mgz")
    assert volume.array.dtype == np.uint16 and volume.array.max() == 12175


@pytest.mark.parametrize("dtype", "u1 i1 u2 i2 u4 i4 u8 i8 f4 f8".split())
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_variants_of_a_good_file_give_the_same_volume(tmp_path: Path, dtype: str, kind) -> None:
    """24 variants each: byte order, compression, form codes, slope; no false alarm."""
    array = voxels(dtype=np.dtype(dtype))
    for order in "<>":
        for suffix in (".nii", ".nii.gz"):
            for code, slope in ((1, 1.0), (0, 1.0), (3, 0.0), (2, np.nan), (1, 2.5), (4, -1e-3)):
                header = kind.header_class(endianness=order)
                header.set_data_dtype(np.dtype(dtype))
                header.set_sform(AFFINE, code)
                header.set_qform(AFFINE, 1)
                image = kind(array, None, header)
                content = bytearray(image.to_bytes())
                size = 540 if kind is nib.Nifti2Image else 348
                fields = kind.header_class(bytes(content[:size]), check=False)
                fields["scl_slope"], fields["scl_inter"] = slope, 7 if slope == 2.5 else 0
                content[:size] = fields.binaryblock
                path = tmp_path / f"image{suffix}"
                path.write_bytes(gzip.compress(bytes(content), 1) if suffix.endswith("gz") else content)
                volume = read_image([path])
                scale = slope if np.isfinite(slope) and slope else 1
                expected = array.astype(np.float64) * np.float32(scale) + fields["scl_inter"]
                np.testing.assert_allclose(volume.array[0], expected, rtol=1e-6)
                np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
                np.testing.assert_array_equal(volume.affine, nib.load(path).affine)


def test_channels_are_the_fourth_dimension_or_several_files(tmp_path: Path) -> None:
    array = voxels((6, 5, 4, 3))
    together = read_image([save(tmp_path / "all.nii.gz", array)])
    np.testing.assert_array_equal(together.array, np.moveaxis(array, -1, 0))
    paths = [save(tmp_path / f"{k}.nii.gz", array[..., k]) for k in range(3)]
    np.testing.assert_array_equal(read_image(paths).array, together.array)
    refused(
        save(tmp_path / "other.nii.gz", array[..., 0], AFFINE @ np.diag([1, 1, 1.2, 1])),
        "spacing",
        lambda path: read_image([*paths, path]),
    )
    refused(tmp_path / "all.nii.gz", "3 channels", lambda path: read_image([*paths, path]))
    refused(tmp_path / "all.nii.gz", "3 channels", read_label)


HEADERS: dict[str, tuple[dict, str]] = {
    "header claims 32000^3": (
        {"dim": [3, 32000, 32000, 32000, 1, 1, 1, 1]},
        "declares 32000x32000x32000 voxels",
    ),
    "header claims 1000^3": ({"dim": [3, 1000, 1000, 1000, 1, 1, 1, 1]}, "is truncated: its header declares"),
    "header claims one slice more": ({"dim": [3, 7, 5, 5, 1, 1, 1, 1]}, "is truncated"),
    "2D": ({"dim": [2, 7, 20, 1, 1, 1, 1, 1]}, "not a volume: its shape is 7x20"),
    "5D": ({"dim": [5, 7, 5, 2, 1, 2, 1, 1]}, "5 dimensions: 7x5x2x1x2"),
    "zero dim": ({"dim": [3, 7, 0, 4, 1, 1, 1, 1]}, "no voxels"),
    "negative dim": ({"dim": [3, 7, -5, 4, 1, 1, 1, 1]}, "no voxels"),
    "dim[0] = 0": ({"dim": [0, 7, 5, 4, 1, 1, 1, 1]}, "declares 0 dimensions"),
    "dim[0] = 9": ({"dim": [9, 7, 5, 4, 1, 1, 1, 1]}, "declares 9 dimensions"),
    "zero pixdim": ({"pixdim": [1, 1, 0, 1, 1, 1, 1, 1]}, r"voxel size of 1x0x1 in its header"),
    "nan pixdim": ({"pixdim": [1, 1, np.nan, 1, 1, 1, 1, 1]}, "voxel size of 1xnanx1"),
    "nan affine": ({"srow_x": [np.nan, 0, 0, 0]}, "affine"),
    "huge affine": ({"srow_x": [1, 0, 0, 1e30]}, "affine"),
    "singular affine": (
        {"srow_x": [1, 1, 0, 0], "srow_y": [0, 0, 1, 0], "srow_z": [0, 0, 1, 0]},
        "singular|spacing",
    ),
    "zero affine": ({"srow_x": [0] * 4, "srow_y": [0] * 4, "srow_z": [0] * 4}, "spacing of"),
    "unknown datatype": ({"datatype": 9999}, "data code 9999 not recognized"),
    "bad magic": ({"magic": b"abc"}, "magic string 'abc' is not valid"),
    "bad offset": ({"vox_offset": 12}, "vox offset 12 too low"),
    "offset beyond the file": ({"vox_offset": 1e9}, "voxels begin at byte 1e.09"),
    "nan offset": ({"vox_offset": np.nan}, "voxels begin at byte nan"),
    "infinite intercept": ({"scl_slope": 1, "scl_inter": np.inf}, "invalid intercept"),
    "slope beyond float32": ({"scl_slope": 3e38}, "not finite"),
    "broken quaternion": ({"sform_code": 0, "qform_code": 1, "quatern_b": 3}, "no rotation"),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("what", HEADERS)
def test_bad_headers_are_refused(tmp_path: Path, what: str, suffix: str) -> None:
    fields, match = HEADERS[what]
    if what == "header claims 1000^3" or suffix == ".nii":
        match = match.replace("compressed", "")
    refused(save(tmp_path / f"image{suffix}", voxels(), **fields), match)


def test_harmless_oddities_of_headers_are_no_false_alarm(tmp_path: Path) -> None:
    array = voxels()
    for fields in (
        {"pixdim": [0, 1, 1, 1, 1, 1, 1, 1]},  # qfac 0 means 1
        {"pixdim": [1, -1, 1, 1, 1, 1, 1, 1]},
        {"scl_slope": np.nan, "scl_inter": np.nan},
        {"bitpix": 8},
        {"vox_offset": 0},
        {"dim": [5, 7, 5, 4, 1, 1, 1, 1]},
        {"dim": [3, 7, 5, 4, 0, 0, 0, 0]},
        {"descrip": b"\xff\xfe not UTF-8"},
        {"xyzt_units": 255},
        {"quatern_b": 3, "qform_code": 1},
        {"sizeof_hdr": 348, "magic": b"ni1"},
    ):
        volume = read_image([save(tmp_path / "image.nii.gz", array, **fields)])
        np.testing.assert_array_equal(volume.array[0], array)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    assert "micrometre" in read_header(save(tmp_path / "i.nii", array, xyzt_units=3)).notes[0]


def test_bad_voxels_are_counted(tmp_path: Path) -> None:
    array = voxels(dtype=np.float64)
    array[0, 0, :3] = (np.nan, np.inf, 1e300)
    refused(save(tmp_path / "image.nii.gz", array), "3 of 140 voxels that are not finite")
    refused(save(tmp_path / "label.nii.gz", array), "3 of 140 voxels that are not finite", read_label)
    array = voxels(dtype=np.float32)
    array[1, 1, 1] = 2.5
    refused(
        save(tmp_path / "fraction.nii.gz", array),
        "1 label voxels that are not whole numbers, such as 2.5",
        read_label,
    )
    array[1, 1, 1] = -2
    refused(save(tmp_path / "negative.nii.gz", array), "negative label values, down to -2", read_label)
    array[1, 1, 1] = 3.0003
    assert read_label(save(tmp_path / "noise.nii.gz", array)).array[0, 1, 1, 1] == 3
    scaled = save(tmp_path / "scaled.nii.gz", voxels(dtype=np.uint8), scl_slope=3, scl_inter=1)
    np.testing.assert_array_equal(read_label(scaled).array[0], voxels(dtype=np.int32) * 3 + 1)
    refused(save(tmp_path / "large.nii.gz", voxels(dtype=np.uint32) + 2**31), "beyond int32", read_label)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "image.txt").write_text("hello")
    (tmp_path / "slice.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    (tmp_path / "lone.hdr").write_bytes(save(tmp_path / "a.nii", voxels(), magic=b"ni1").read_bytes()[:348])
    refused(tmp_path / "pipe.nii.gz", "not a regular file")
    refused(tmp_path / "zero.nii", "not a regular file")
    refused(tmp_path / "folder.nii.gz", "holds no DICOM slices")
    refused(tmp_path / "image.txt", "unknown format")
    refused(tmp_path / "slice.dcm", "single DICOM file")
    for name in ("missing.nii.gz", "link.nii.gz", "missing.mha"):
        refused(tmp_path / name, "there is no file")
    with pytest.raises(UserError, match=r"there is no file .*lone\.img"):
        read_image([tmp_path / "lone.hdr"])
    with pytest.raises(UserError, match="not a file name"):
        read_image([tmp_path / "nul\0.nii.gz"])


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz"])
def test_every_flipped_bit_is_found_or_has_no_effect(tmp_path: Path, suffix: str) -> None:
    """nibabel returned wrong voxels for such files."""
    array, path = voxels((20, 20, 10)), tmp_path / f"image{suffix}"
    nib.save((nib.Nifti1Image if suffix == ".nii.gz" else nib.MGHImage)(array, AFFINE), path)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        flipped = bytearray(content)
        flipped[generator.integers(len(flipped))] ^= 1 << generator.integers(8)
        path.write_bytes(flipped)
        try:
            np.testing.assert_array_equal(
                read_image([path]).array[0], array
            )  # a time or a name in gzip's header
        except UserError:
            found += 1
    assert found > 290
    for _ in range(100):
        path.write_bytes(content[: generator.integers(len(content))])
        with pytest.raises(UserError, match="image"):
            read_image([path])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgh", ".nrrd", ".mha"])
def test_mutated_headers_raise_nothing_but_user_errors(tmp_path: Path, suffix: str) -> None:
    import SimpleITK as sitk

    array, path = voxels((6, 5, 4)), tmp_path / f"image{suffix}"
    if suffix in (".nrrd", ".mha"):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    else:
        nib.save((nib.MGHImage if suffix == ".mgh" else nib.Nifti1Image)(array, AFFINE), path)
    content = path.read_bytes()
    content = gzip.decompress(content) if suffix == ".nii.gz" else content
    generator = np.random.default_rng(0)
    for _ in range(150 if suffix in (".nrrd", ".mha") else 600):
        mutated = bytearray(content)
        for place in generator.integers(min(348, len(content)), size=generator.integers(1, 6)):
            mutated[place] = generator.integers(256)
        path.write_bytes(gzip.compress(mutated, 1) if suffix == ".nii.gz" else mutated)
        try:
            assert np.isfinite(read_image([path]).array).all()
        except UserError as error:
            assert str(tmp_path) in error.message


BOMBS = """
import gzip, resource, sys, time
from pathlib import Path
import nibabel, numpy, SimpleITK, pydicom
from unetrkit.data.volume import read_image, read_label
from unetrkit.errors import UserError
before = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (before + 2**30, before + 2**30))
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.perf_counter()
    for read in (lambda path: read_image([path]), read_label):
        try:
            read(path)
        except UserError as error:
            print(path.name, "|", error.message)
        else:
            sys.exit(f"{path.name} was read")
    if time.perf_counter() - start > 10:
        sys.exit(f"{path.name} took {time.perf_counter() - start:.1f} s")
"""


def test_bombs_are_refused_in_little_memory_and_time(tmp_path: Path) -> None:
    zeros = b"\0" * 2**20

    def bomb(name: str, start: bytes, megabytes: int) -> None:
        (tmp_path / name).write_bytes(gzip.compress(start) + gzip.compress(zeros) * megabytes)

    small = save(tmp_path / "a_small.nii", voxels()).read_bytes()
    bomb("b_small_header.nii.gz", small, 700)
    bomb("c_small_header.mgz", nib.MGHImage(voxels(), AFFINE).to_bytes(), 300)
    large = save(tmp_path / "a_small.nii", voxels(), dim=[3, 1000, 1000, 1000, 1, 1, 1, 1]).read_bytes()
    bomb("d_large_header.nii.gz", large, 1)
    bomb("e_claimed_and_there.nii.gz", large, 1910)  # 2 GB: honest, but beyond this process's memory
    bomb("f_no_image.nii.gz", b"", 300)
    (tmp_path / "a_small.nii").unlink()
    (tmp_path / "g.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 900 900 900\nencoding: gzip\nendian: little\n\n"
        + gzip.compress(zeros)
    )
    (tmp_path / "h.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 30000 30000 30000\n"
        b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n" + zeros
    )
    result = subprocess.run(
        [sys.executable, "-c", BOMBS, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout
    assert len(result.stdout.splitlines()) == 14


def test_formats_of_the_extra_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "image.nrrd").write_bytes(b"NRRD0004")
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "IM0").write_bytes(b"\0" * 132)
    for name in ("image.nrrd", "ct"):
        with pytest.raises(MissingExtra, match=f"{name}.*needs the `io` extra"):
            read_image([tmp_path / name])


def test_header_of_a_large_ct_is_accepted(tmp_path: Path) -> None:
    path = save(tmp_path / "ct.nii", voxels(), dim=[3, 512, 512, 2000, 1, 1, 1, 1])
    with path.open("r+b") as file:
        file.truncate(352 + 2 * 512 * 512 * 2000)  # sparse
    assert read_header(path).shape == (512, 512, 2000)


def itk_image(array: np.ndarray):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.T)
    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_itk_formats_are_read_in_ras_and_damage_is_found(
    tmp_path: Path, suffix: str, compressed: bool
) -> None:
    import SimpleITK as sitk

    array, path = voxels((9, 8, 7), np.float32), tmp_path / f"image{suffix}"
    sitk.WriteImage(itk_image(array), str(path), compressed)
    volume = read_image([path])
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-9)
    assert sorted(files_of(path)) == sorted(tmp_path.iterdir())
    data = next((file for file in tmp_path.iterdir() if file.name.endswith(("raw", "raw.gz"))), path)
    content = data.read_bytes()
    for part in (0.5, 0.9, 0.999):
        data.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(UserError, match="truncated"):
            read_image([path])
    if compressed:
        damaged = bytearray(content)
        damaged[-len(content) // 3] ^= 16
        data.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|truncated|holds more"):
            read_image([path])
    array[0, 0, 0] = np.nan
    sitk.WriteImage(itk_image(array), str(path), compressed)
    refused(path, "1 of 504 voxels that are not finite")


def test_itk_channels_colours_and_text_files(tmp_path: Path) -> None:
    import SimpleITK as sitk

    array = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)  # z y x c
    for name in ("image.nrrd", "image.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / name))
        np.testing.assert_array_equal(read_image([tmp_path / name]).array, array.T)
    sitk.WriteImage(sitk.GetImageFromArray(array[..., 0]), str(tmp_path / "a.nrrd"))
    content = (tmp_path / "a.nrrd").read_bytes()
    for name, old, new, match in (
        ("ascii.nrrd", b"encoding: raw", b"encoding: ascii", "encoding `ascii`"),
        ("kinds.nrrd", b"kinds: domain", b"kinds: RGB-color", "colours"),
        ("away.nrrd", b"encoding: raw", b"encoding: raw\ndata file: ../../etc/passwd", "another folder"),
        ("list.nrrd", b"encoding: raw", b"encoding: raw\ndata file: LIST", "several files"),
        ("skip.nrrd", b"encoding: raw", b"encoding: raw\nbyte skip: x", "damaged header"),
    ):
        (tmp_path / name).write_bytes(content.replace(old, new))
        refused(tmp_path / name, match)
    (tmp_path / "page.nrrd").write_text("<!DOCTYPE html>")
    refused(tmp_path / "page.nrrd", "web page")
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / "4d.mha"))
    refused(tmp_path / "4d.mha", "4 dimensions")


def likes(folder: Path) -> dict[str, Path]:
    """One image in every way of saying where it lies."""
    import SimpleITK as sitk

    array = voxels()
    both = save(folder / "both.nii.gz", array, sform_code=2, qform_code=1, xyzt_units=10, descrip=b"by hand")
    found = {
        "sform": save(folder / "sform.nii.gz", array, qform_code=0),
        "both": both,
        "no codes": save(folder / "none.nii.gz", array, qform_code=0, sform_code=0),
        "4D": save(folder / "4d.nii.gz", voxels((7, 5, 4, 2))),
        "scaled": save(folder / "scaled.nii.gz", array, scl_slope=2.5, scl_inter=-3, cal_max=200),
        "NIfTI-2": save(folder / "two.nii", array, kind=nib.Nifti2Image),
        "qfac 0": save(folder / "qfac.nii", array, pixdim=[0, 1, 1, 1, 1, 1, 1, 1]),
    }
    header = nib.Nifti1Header(endianness=">")
    header.set_qform(AFFINE, 1)
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(array, None, header), folder / "qform.nii.gz")
    nib.save(nib.Nifti1Pair(array, AFFINE), folder / "pair.hdr")
    nib.save(nib.MGHImage(array, AFFINE), folder / "mgh.mgz")
    sitk.WriteImage(itk_image(array), str(folder / "nrrd.nrrd"))
    names = ("qform.nii.gz", "pair.hdr", "pair.img", "mgh.mgz", "nrrd.nrrd")
    return found | {name: folder / name for name in names}


def test_written_labels_lie_where_the_image_lies(tmp_path: Path) -> None:
    label = voxels(dtype=np.int64) % 14
    for what, like in likes(tmp_path).items():
        path = tmp_path / "out" / f"{what}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        write_label(path, label, like, {0: "background", 1: "spleen", 13: "Nebenniere ü"})
        image, header = nib.load(path), read_header(like)
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), label, err_msg=what)
        assert image.get_data_dtype() == np.uint8 and image.shape == label.shape
        assert image.header.get_intent()[0] == "label"
        names = json.loads(image.header.extensions[0].get_content())
        assert names == {"labels": {"0": "background", "1": "spleen", "13": "Nebenniere ü"}}
        if like.suffix in (".mgz", ".nrrd"):
            np.testing.assert_allclose(image.affine, header.affine, rtol=1e-6)
            assert image.header["sform_code"] == image.header["qform_code"] == 1
            continue
        np.testing.assert_array_equal(image.affine, header.affine, err_msg=what)
        original = nib.load(like).header
        for field in ("sform_code", "qform_code", "xyzt_units", "descrip"):
            assert image.header[field] == original[field], (what, field)
        for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"):
            np.testing.assert_array_equal(image.header[field], original[field])
        np.testing.assert_array_equal(image.header["pixdim"][1:4], original["pixdim"][1:4])
    assert [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(("highest", "dtype"), [(255, np.uint8), (256, np.uint16), (70000, np.int32)])
def test_labels_are_stored_in_the_smallest_type(tmp_path: Path, highest: int, dtype: type) -> None:
    like = save(tmp_path / "image.nii.gz", voxels())
    label = voxels(dtype=np.int32)
    label[0, 0, 0] = highest
    for name in ("a.nii", "b.nii.gz", "c.nii.gz"):
        write_label(tmp_path / name, label, like, {})
        assert nib.load(tmp_path / name).get_data_dtype() == dtype
        volume = read_label(tmp_path / name)
        assert volume.array.dtype == dtype
        np.testing.assert_array_equal(volume.array[0], label)
    assert (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()


def test_labels_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    like = save(tmp_path / "image.nii.gz", voxels())
    with pytest.raises(ValueError, match="not on the grid"):
        write_label(tmp_path / "a.nii.gz", voxels((7, 5, 3)), like, {})
    with pytest.raises(ValueError, match="not negative"):
        write_label(tmp_path / "a.nii.gz", voxels() - 5, like, {})
    refused(tmp_path / "a.mha", "cannot be written", lambda path: write_label(path, voxels(), like, {}))
    refused(tmp_path / "no/a.nii.gz", "cannot write", lambda path: write_label(path, voxels(), like, {}))


def test_real_labels_survive_writing(shared_data: Path, tmp_path: Path) -> None:
    for name in GOOD:
        like = shared_data / "awkward" / name
        header = read_header(like)
        label = voxels(header.shape, np.uint8)
        write_label(tmp_path / "label.nii.gz", label, like, {1: "one"})
        again = read_label(tmp_path / "label.nii.gz")
        np.testing.assert_array_equal(again.array[0], label)
        if like.suffix in (".nrrd", ".mha"):
            np.testing.assert_allclose(again.affine, header.affine, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(again.affine, header.affine)
