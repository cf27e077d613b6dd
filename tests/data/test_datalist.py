"""Every layout that a data set may come in, and everything that may be wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unetrkit.data.datalist import Case, Dataset, cases_to_learn_from, read_dataset
from unetrkit.data.layouts import stem
from unetrkit.errors import UserError


def touch(root: Path, *names: str) -> None:
    """Empty files: reading a data list opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_list(root: Path, content: object) -> Path:
    path = root / "dataset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def names(dataset: Dataset) -> list[str]:
    return [case.name for case in dataset.cases]


def test_a_decathlon_list_is_read_in_place(tmp_path):
    touch(tmp_path, "i/a.nii.gz", "l/a.nii.gz", "i/b.nii.gz", "l/b.nii.gz", "i/t.nii.gz", "i/u.nii.gz")
    path = write_list(
        tmp_path,
        {
            "name": "Organs",
            "modality": {"0": "CT"},
            "labels": {"1": "liver", "0": "background"},
            "numTraining": 80,
            "licence": None,
            "test": ["./i/t.nii.gz", {"image": "i/u.nii.gz"}],
            "training": [{"image": "i/a.nii.gz", "label": "l/a.nii.gz", "fold": 3, "age": {"years": 7}}],
            "validation": [{"image": ["i/b.nii.gz"], "label": "l/b.nii.gz", "subject": 17}],
        },
    )
    dataset = read_dataset(path)
    assert dataset == Dataset(
        "Organs",
        tmp_path,
        (
            Case("a", (tmp_path / "i/a.nii.gz",), tmp_path / "l/a.nii.gz", "a", "training", 3),
            Case("b", (tmp_path / "i/b.nii.gz",), tmp_path / "l/b.nii.gz", "17", "validation"),
            Case("t", (tmp_path / "i/t.nii.gz",), None, "t", "test"),
            Case("u", (tmp_path / "i/u.nii.gz",), None, "u", "test"),
        ),
        {0: "background", 1: "liver"},
        ("CT",),
    )
    assert read_dataset(tmp_path) == dataset


def test_a_byte_order_mark_and_a_relative_path_are_accepted(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii")
    (tmp_path / "list.json").write_bytes(b"\xef\xbb\xbf" + b'{"training": ["a.nii"]}')
    monkeypatch.chdir(tmp_path)
    dataset = read_dataset(Path("list.json"))
    assert dataset.cases[0].images == (tmp_path / "a.nii",)
    assert (dataset.labels, dataset.channels, dataset.name) == ({}, ("image",), tmp_path.name)


def test_a_set_of_images_only_needs_no_labels(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    path = write_list(tmp_path, {"training": [{"image": "a.nii"}, "b.nii"], "validation": ["c.nii"]})
    assert [case.label for case in read_dataset(path).cases] == [None, None, None]


@pytest.mark.parametrize(
    ("declared", "labels"),
    [
        ({"0": "background", "2": "liver"}, {0: "background", 2: "liver"}),
        ({"background": 0, "liver": 2}, {0: "background", 2: "liver"}),
        ({"background": "0", "liver": "2"}, {0: "background", 2: "liver"}),
        ({"1": "liver"}, {0: "background", 1: "liver"}),
        (["background", "liver"], {0: "background", 1: "liver"}),
        ("ids 1 to 7", {}),
        ({}, {}),
    ],
)
def test_labels_are_read_in_every_direction(tmp_path, declared, labels):
    touch(tmp_path, "a.nii")
    assert read_dataset(write_list(tmp_path, {"labels": declared, "training": ["a.nii"]})).labels == labels


@pytest.mark.parametrize(
    ("declared", "channels"),
    [
        ({"modality": {"1": "T2", "0": "T1"}}, ("T1", "T2")),
        ({"channel_names": {"0": "T1", "1": "T2"}, "modality": "MR"}, ("T1", "T2")),
        ({"modality": ["T1", "T2"]}, ("T1", "T2")),
        ({}, ("image_0", "image_1")),
    ],
)
def test_channels_are_named(tmp_path, declared, channels):
    touch(tmp_path, "a.nii", "b.nii")
    path = write_list(tmp_path, {**declared, "training": [{"image": ["a.nii", "b.nii"]}]})
    assert read_dataset(path).channels == channels


def test_names_are_unique_and_safe_as_file_names(tmp_path):
    files = [
        "p1/x/CT.nii.gz",
        "p2/x/CT.nii.gz",
        "Köln (1).nii.gz",
        "a.b.nii",
        "..hidden.nii",
        "q:1.nii",
        "P.nii",
        "p.nii",
    ]
    touch(tmp_path, *files)
    dataset = read_dataset(write_list(tmp_path, {"training": files[:6]}))
    assert names(dataset) == ["p1_x_CT", "p2_x_CT", "Köln (1)", "a.b", "hidden", "q_1"]
    if len({path.name for path in tmp_path.glob("[pP].nii")}) == 2:  # a disk that tells p from P
        with pytest.raises(UserError, match=r"training\[1\] and .*training\[0\] would both be the case `p`"):
            read_dataset(write_list(tmp_path, {"training": files[6:]}))


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("sub-07/ses-1/anat/sub-07_ses-1_T1w.nii.gz", "sub-07"),
        ("sub-ct_label-22_ct.nii.gz", "sub-ct"),
        ("subject-3.nii.gz", "subject-3"),
        ("sub-.nii", "sub-"),
    ],
)
def test_the_subject_is_that_of_bids_else_the_name(tmp_path, name, subject):
    touch(tmp_path, name)
    assert read_dataset(write_list(tmp_path, {"training": [name]})).cases[0].subject == subject


HOSTILE = [
    ("[1, 2]", "must hold an object with `training`"),
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ("{}", "lists no cases"),
    ('{"training": []}', "lists no cases"),
    ('{"trainning": ["a.nii"]}', "none of the keys"),
    ('{"training": {"a": 1}}', "`training` must be a list of cases, found an object with 1 entries"),
    ('{"training": ["a.nii", 3]}', r"training\[1\] must be a path or an object with `image`, found `3`"),
    ('{"training": ["a.nii", null]}', r"training\[1\] must be"),
    ('{"training": [{"label": "a.nii"}]}', r"training\[0\]: `image` must be a path"),
    ('{"training": [{"image": []}]}', r"training\[0\]: `image` must be a path"),
    ('{"training": [""]}', r"training\[0\]: `image` must be a path"),
    ('{"training": [{"image": ["a.nii", 7]}]}', r"training\[0\]: `image` must be"),
    ('{"training": [{"image": {"a.nii": 1}}]}', "found an object with 1 entries"),
    ('{"training": [{"image": "a.nii", "label": ["b.nii"]}]}', "`label` must be one path, found a list"),
    ('{"training": [{"image": "a.nii", "fold": NaN}]}', "`fold` must be a whole number from 0, found `nan`"),
    ('{"training": [{"image": "a.nii", "fold": -1}]}', "`fold` must be"),
    ('{"training": [{"image": "a.nii", "fold": true}]}', "`fold` must be"),
    ('{"training": [{"image": "a.nii", "fold": "1"}]}', "`fold` must be"),
    ('{"training": [{"image": "a.nii", "subject": {"id": 1}}]}', "`subject` must be a text"),
    ('{"training": ["missing.nii"]}', r"training\[0\]: there is no file `.*missing.nii`$"),
    ('{"training": ["no.nii", "no2.nii"]}', r"no.nii` \(nor 1 other of this list\)"),
    ('{"training": ["a\\u0000.nii"]}', "cannot be the name of a file"),
    ('{"training": ["\\ud800.nii"]}', "cannot be the name of a file"),
    (f'{{"training": ["{"a" * 5000}.nii"]}}', "cannot be the name of a file: File name too long"),
    ('{"training": ["loop.nii"]}', "cannot be the name of a file|there is no file"),
    ('{"training": ["a.nii"], "test": ["./a.nii"]}', r"test\[0\] and .*training\[0\] have the same image"),
    ('{"training": [{"image": ["a.nii", "a.nii"]}]}', "have the same image"),
    ('{"training": [{"image": "a.nii", "label": "a.nii"}]}', "is both image and label"),
    ('{"training": [{"image": "a.nii", "label": "b.nii"}, "c.nii"]}', r"training\[1\] has no label"),
    ('{"training": ["a.nii", {"image": ["b.nii", "c.nii"]}]}', r"training\[1\] has 2 images, but .* has 1"),
    (
        '{"modality": ["x", "y", "z"], "training": [{"image": ["b.nii", "c.nii"]}]}',
        "2 images, but 3 in `channel_names`",
    ),
    ('{"modality": {"0": 1}, "training": ["a.nii"]}', "the channels must be names"),
    ('{"modality": {"1": "CT"}, "training": ["a.nii"]}', "the channels must be names"),
    ('{"labels": {"liver": -1}, "training": ["a.nii"]}', "must have an id from 0 to 65535, found `-1`"),
    ('{"labels": {"liver": 1.5}, "training": ["a.nii"]}', "must have an id"),
    ('{"labels": {"liver": true}, "training": ["a.nii"]}', "must have an id"),
    ('{"labels": {"a": 1, "b": 1}, "training": ["a.nii"]}', "`a` and `b` have the same id 1"),
    ('{"labels": {"whole": [1, 2]}, "training": ["a.nii"]}', "is a region"),
    ('{"training": ' + "[" * 100_000, "nested too deeply|is not JSON"),
]


@pytest.mark.parametrize(("content", "message"), HOSTILE, ids=[content[:60] for content, _ in HOSTILE])
def test_a_hostile_list_is_refused_with_its_entry(tmp_path, content, message):
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    os.symlink("loop.nii", tmp_path / "loop.nii")
    path = write_list(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        read_dataset(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_list_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_dataset(tmp_path / "none.json")
    (tmp_path / "list.json").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(UserError, match="is not JSON"):
        read_dataset(tmp_path / "list.json")


@pytest.mark.parametrize("way", ["parent", "absolute", "link", "linked folder", "label"])
def test_a_path_that_leaves_the_folder_is_refused_unless_allowed(tmp_path, way):
    root = tmp_path / "set"
    touch(tmp_path, "secret.nii", "set/a.nii")
    os.symlink(tmp_path / "secret.nii", root / "link.nii")
    os.symlink(tmp_path, root / "out", target_is_directory=True)
    entry = {
        "parent": {"image": "../secret.nii"},
        "absolute": {"image": str(tmp_path / "secret.nii")},
        "link": {"image": "link.nii"},
        "linked folder": {"image": "out/secret.nii"},
        "label": {"image": "a.nii", "label": "sub/../../secret.nii"},
    }[way]
    (root / "sub").mkdir()
    path = write_list(root, {"training": [entry]})
    with pytest.raises(UserError, match=r"training\[0\]: `.*` leads out of the folder") as error:
        read_dataset(path)
    assert "--allow-outside" in error.value.hint
    case = read_dataset(path, allow_outside=True).cases[0]
    assert (case.label or case.images[0]).resolve() == tmp_path / "secret.nii"


def test_paths_that_stay_in_the_folder_are_accepted_however_they_are_written(tmp_path):
    touch(tmp_path, "sub/a.nii", "b.nii")
    os.symlink(tmp_path / "b.nii", tmp_path / "c.nii")
    path = write_list(tmp_path, {"training": [str(tmp_path / "sub/a.nii"), "sub/../c.nii"]})
    assert len(read_dataset(path).cases) == 2


def test_an_nnunet_folder_is_read_with_its_folds(tmp_path):
    for case in ("la_1", "la_2", "la_3"):
        touch(tmp_path, f"imagesTr/{case}_0000.nrrd", f"imagesTr/{case}_0001.nrrd", f"labelsTr/{case}.nrrd")
    touch(
        tmp_path, "imagesTs/x_0000.nrrd", "imagesTs/x_0001.nrrd", "imagesTr/.DS_Store", "imagesTr/notes.txt"
    )
    declared = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 3,
        "file_ending": ".nrrd",
    }
    path = write_list(tmp_path, declared)
    splits = [{"train": ["la_2", "la_3"], "val": ["la_1"]}, {"train": ["la_1", "la_3"], "val": ["la_2"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    dataset = read_dataset(tmp_path)
    assert read_dataset(path) == dataset
    assert [(case.name, case.split, case.fold) for case in dataset.cases] == [
        ("la_1", "training", 0), ("la_2", "training", 1), ("la_3", "training", None), ("x", "test", None),
    ]  # fmt: skip
    assert dataset.cases[0].images == tuple(tmp_path / f"imagesTr/la_1_000{k}.nrrd" for k in (0, 1))
    assert dataset.cases[0].label == tmp_path / "labelsTr/la_1.nrrd"
    assert (dataset.labels, dataset.channels) == ({0: "background", 1: "tumour"}, ("CT", "PET"))


@pytest.mark.parametrize(
    ("files", "splits", "message"),
    [
        (["imagesTr/a_0001.nii"], None, "channels must be numbered from _0000 on, found a_0001.nii"),
        (["imagesTr/a_0000.nii", "labelsTr/b.nii"], None, "has no image `b_0000`"),
        (["imagesTr/a_0000.nii"], [{"val": ["b"]}], "names the case `b`, which has no image"),
        (["imagesTr/a_0000.nii"], [{"val": ["a"]}, {"val": ["a"]}], "validated in the splits 0 and 1"),
        (["imagesTr/a_0000.nii"], {"val": ["a"]}, "must be a list"),
        (["imagesTr/a_0000.nii"], [{"val": [1]}], "split 0 is not"),
        (["imagesTr/a_0000.nii", "imagesTr/b_0000.nii", "labelsTr/a.nii"], None, "case `b` .* has no label"),
    ],
)
def test_a_broken_nnunet_folder_is_refused(tmp_path, files, splits, message):
    touch(tmp_path, *files)
    if splits is not None:
        (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path)


def test_a_list_without_cases_beside_imagestr_is_not_taken_for_nnunet(tmp_path):
    touch(tmp_path, "imagesTr/ct.nii", "labelsTr/ct.nii")
    path = write_list(tmp_path, {"labels": {"0": "background", "1": "liver"}, "channel_names": {"0": "CT"}})
    with pytest.raises(
        UserError, match=f"`{path}` lists no cases: it has none of the keys `training`"
    ) as error:
        read_dataset(path)
    assert '"training": [{"image"' in error.value.hint
    assert names(read_dataset(tmp_path)) == ["ct"]  # the folder itself is one of pairs


@pytest.mark.parametrize(
    ("files", "channels", "cases"),
    [
        (["a_0000.nii", "b_0000.nii"], 1, {"a": 1, "b": 1}),
        (["a_0000.nii", "a_0001.nii", "b_0000.nii", "b_0001.nii"], 2, {"a": 2, "b": 2}),
        (["images/a_0000.nii", "images/a_0001.nii"], 2, {"a": 2}),
        (["a_0000.nii", "a_0001.nii", "a_0002.nii"], 1, {"a_0000": 1, "a_0001": 1, "a_0002": 1}),
        (["a_0000.nii", "b_0000.nii"], 2, {"a_0000": 1, "b_0000": 1}),  # of two channels each
        (["a_0000.nii", "b.nii"], 1, {"a_0000": 1, "b": 1}),
        (["a_0000.nii", "a_0001.nii"], None, {"a_0000": 1, "a_0001": 1}),
    ],
)
def test_numbered_files_are_the_channels_that_a_model_asks_for(tmp_path, files, channels, cases):
    touch(tmp_path, *files)
    found = read_dataset(tmp_path, channels=channels).cases
    assert {case.name: len(case.images) for case in found} == cases


def test_a_numbered_case_that_lacks_its_first_channel_is_named(tmp_path):
    touch(tmp_path, "a_0000.nii", "a_0001.nii", "b_0001.nii")
    with pytest.raises(
        UserError, match=r"case `b`: channels must be numbered from _0000 on, found b_0001\.nii"
    ):
        read_dataset(tmp_path, channels=2)


@pytest.mark.parametrize(
    ("files", "pairs"),
    [
        (
            ["images/a.nii.gz", "images/b.mha", "labels/a.nii.gz", "labels/b.nii"],
            {"a": "a.nii.gz", "b": "b.nii"},
        ),
        (["imagesTr/a.nii", "labelsTr/a_seg.nii"], {"a": "a_seg.nii"}),
        (["a_image.nii", "a_label.nii", "readme.txt"], {"a_image": "a_label.nii"}),
        (
            ["a.nii.gz", "a_seg.nii.gz", "b.nii.gz", "b_mask.nii.gz"],
            {"a": "a_seg.nii.gz", "b": "b_mask.nii.gz"},
        ),
        (["CT_image.nii", "CT_mask.nii"], {"CT_image": "CT_mask.nii"}),
        (["images/a.nii", "images/b.nii"], {"a": None, "b": None}),
        (["a.nii", "b.nii"], {"a": None, "b": None}),
    ],
)
def test_pairs_are_found_in_a_plain_folder(tmp_path, files, pairs):
    touch(tmp_path, *files)
    cases = read_dataset(tmp_path).cases
    assert {case.name: case.label and case.label.name for case in cases} == pairs
    assert {case.split for case in cases} == {"training"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["readme.txt"], "holds no data set"),
        (["images/a.nii", "labels/a.nii", "labels/b.nii"], "b.nii` has no image of the same name"),
        (["a.nii", "a_seg.nii", "a_mask.nii"], "has two labels: `a_mask.nii` and `a_seg.nii`"),
        (["images/a.nii", "images/b.nii", "labels/a.nii"], "`images/b.nii` has no label"),
    ],
)
def test_a_broken_folder_of_pairs_is_refused(tmp_path, files, message):
    touch(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path)


def test_a_table_is_read(tmp_path):
    touch(tmp_path, "a.nii", "a2.nii", "al.nii", "b, 1.nii", "b2.nii", "bl.nii", "c.nii", "c2.nii")
    path = tmp_path / "list.csv"
    path.write_text(
        "\ufeffImage_0,image_1,label,subject,split,fold,note\r\n"
        "a.nii,a2.nii,al.nii,ann,,2,good\r\n"
        '"b, 1.nii",b2.nii,bl.nii,,val,,\r\n'
        "\r\n"
        "c.nii,c2.nii,,ann,test,,\r\n",
        encoding="utf-8",
    )
    dataset = read_dataset(path)
    assert [(case.name, case.subject, case.split, case.fold) for case in dataset.cases] == [
        ("a", "ann", "training", 2), ("b, 1", "b, 1", "validation", None), ("c", "ann", "test", None),
    ]  # fmt: skip
    assert dataset.cases[1].images == (tmp_path / "b, 1.nii", tmp_path / "b2.nii")
    assert dataset.cases[2].label is None
    path.write_text("image,label\na.nii; a2.nii,al.nii\n")
    assert read_dataset(path).cases[0].images == (tmp_path / "a.nii", tmp_path / "a2.nii")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column `image`"),
        (b"scan,label\na.nii,b.nii\n", "has no column `image`"),
        (b"image,label\n", "lists no cases"),
        (b"image,label\na.nii\n", "line 2 has 1 cells, but the header has 2"),
        (b"image,label\n,a.nii\n", "line 2 has no image"),
        (b"image,split\na.nii,holdout\n", "line 2: `holdout` is not a split"),
        (b"image,fold\na.nii,nan\n", "line 2: `fold` must be a whole number from 0, found `nan`"),
        (b"image\n\na.nii\nb.nii\n", "line 4: there is no file"),
        (b"image\n\xff\xfe\n", "not a table in UTF-8"),
        (b"image\n../x.nii\n", "line 2: `../x.nii` leads out"),
        (b"image\n" + b"x" * 200_000, "not a table"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path, content, message):
    touch(tmp_path, "a.nii")
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path / "list.csv")


def test_an_implausibly_large_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("unetrkit.data.tables.LARGEST_JSON", 20)
    (tmp_path / "list.csv").write_text("image\n" + "a.nii\n" * 3)
    with pytest.raises(UserError, match="is larger than"):
        read_dataset(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.nii.gz", "a"), ("a.b.NII.GZ", "a.b"), ("a.mha", "a"), ("series.1", "series.1"), (".nii", ".nii")],
)
def test_stem_removes_the_ending_of_an_image_only(name, expected):
    assert stem(name) == expected


@pytest.mark.parametrize(
    ("path", "cases", "labels"),
    [
        ("mr_hippocampus", 240, 3),
        ("mr_hippocampus/dataset_40_10.json", 50, 3),
        ("ct_openkbp_hn/dataset.json", 40, 8),
        ("ct_openkbp_ssl/dataset.json", 160, 0),
        ("ct_openkbp_partial/dataset.json", 20, 8),
        ("ct_abdomen_totalseg/dataset_btcv13.json", 3, 14),
        ("multimodal_sts/dataset_multigrid.json", 3, 2),
        ("mr_brain_freesurfer/dataset.json", 1, 0),
        ("spine_ct_mr/dataset.json", 2, 0),
        ("ssl_ct.json", 65, 0),
    ],
)
def test_real_lists_are_read(shared_data, path, cases, labels):
    dataset = read_dataset(shared_data / path)
    assert (len(dataset.cases), len(dataset.labels)) == (cases, labels)
    assert len({name.casefold() for name in names(dataset)}) == cases


@pytest.mark.parametrize("name", ["list.json", "list.csv"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe"):
        read_dataset(tmp_path / name)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.nii.gz")).touch()
    with pytest.raises(UserError, match=r"a\\udcff.nii.gz' cannot be the name of a file: it is not UTF-8"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("table", [True, False])
def test_a_dataset_json_beside_a_table_or_in_a_folder_of_pairs_names_classes_and_channels(tmp_path, table):
    for name in ("images/a.nii", "labels/a.nii"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text("image,label\nimages/a.nii,labels/a.nii\n")
    about = {"name": "livers", "labels": {"1": "liver"}, "channel_names": {"0": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    dataset = read_dataset(tmp_path / "list.csv" if table else tmp_path)
    assert (dataset.labels, dataset.channels) == ({0: "background", 1: "liver"}, ("CT",))
    assert dataset.cases[0].label == tmp_path / "labels/a.nii"


def test_labels_are_left_aside_when_asked_and_never_by_themselves(tmp_path):
    touch(tmp_path, "a.nii", "al.nii", "b.nii", "c.nii")
    training = [{"image": "a.nii", "label": "al.nii"}, "b.nii"]
    labels = {"0": "background", "1": "liver"}
    path = write_list(tmp_path, {"labels": labels, "training": training, "test": ["c.nii"]})
    with pytest.raises(UserError, match=r"training\[1\] has no label \(1 such case of 2\)") as caught:
        read_dataset(path)
    assert "`prepare --unlabelled` takes every image" in caught.value.hint
    dataset = read_dataset(path, unlabelled=True)
    assert [case.label for case in dataset.cases] == [None] * 3 and dataset.labels == {}
    assert [case.name for case in cases_to_learn_from(dataset)] == ["a", "b"]


def test_what_has_no_label_is_learnt_from_where_no_class_is_declared(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "t.nii")
    listed = {"training": ["a.nii"], "validation": [{"image": "b.nii"}], "test": ["t.nii"]}
    assert [case.name for case in cases_to_learn_from(read_dataset(write_list(tmp_path, listed)))] == [
        "a",
        "b",
    ]
    declared = read_dataset(write_list(tmp_path, {"labels": {"liver": 1}, **listed}))
    with pytest.raises(UserError, match="no labelled case to learn from") as caught:
        cases_to_learn_from(declared)
    assert "--unlabelled" in caught.value.hint
