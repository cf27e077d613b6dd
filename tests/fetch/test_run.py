"""Whole data sets from the archives that keep them, into a folder with the published data list."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data.test_dicom import write_series
from fetch.archive_server import Archives, md5, tar_of, zip_of
from unetrkit.data.datalist import read_dataset
from unetrkit.errors import UserError
from unetrkit.fetch import catalogue, sources
from unetrkit.fetch.catalogue import Published
from unetrkit.fetch.run import fetch
from unetrkit.fetch.sources import Hosts


def quiet(done: float, total: int, note: str = "") -> None:
    pass


def hosts(archives: Archives) -> Hosts:
    return Hosts(f"{archives.url}/zenodo/", f"{archives.url}/nbia/", f"{archives.url}/")


def scan(seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 2, (4, 4, 4)).astype(np.uint8)
    return nib.Nifti1Image(values, np.eye(4)).to_bytes()


@pytest.fixture
def spleen(archives, monkeypatch):
    """MSD's spleen, small: two labelled scans and one without."""
    listed = {
        "labels": {"0": "background", "1": "spleen"},
        "training": [
            {"image": f"./imagesTr/s_{k}.nii.gz", "label": f"./labelsTr/s_{k}.nii.gz"} for k in (1, 2)
        ],
        "test": ["./imagesTs/s_3.nii.gz"],
    }
    files = {
        **{
            f"Task09_Spleen/{folder}/s_{k}.nii.gz": scan(k)
            for folder in ("imagesTr", "labelsTr")
            for k in (1, 2)
        },
        "Task09_Spleen/imagesTs/s_3.nii.gz": scan(3),
        "Task09_Spleen/imagesTr/._s_1.nii.gz": b"litter",
        "Task09_Spleen/dataset.json": json.dumps(listed).encode(),
    }
    archives.files["/Task09_Spleen.tar"] = content = tar_of(files)
    what = ((f"{archives.url}/Task09_Spleen.tar", f"md5:{md5(content)}"),)
    one = Published(
        "msd-spleen", what, "https", "decathlon", 0.1, "CC BY-SA 4.0", "http://medicaldecathlon.com"
    )
    monkeypatch.setitem(catalogue.DATASETS, "msd-spleen", one)
    return files


def test_a_task_of_the_decathlon_and_only_what_is_missing_again(archives, spleen, tmp_path):
    out = tmp_path / "spleen"
    dataset = read_dataset(fetch("msd-spleen", out, quiet))
    assert [case.split for case in dataset.cases] == ["training", "training", "test"]
    assert dataset.labels[1] == "spleen"
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "dataset.json", "downloads", "imagesTr", "imagesTs", "labelsTr",
    ]  # fmt: skip
    assert not list((out / "downloads").iterdir())

    archives.asked.clear()
    fetch("msd-spleen", out, quiet)
    assert not archives.asked

    kept = (out / "imagesTr/s_2.nii.gz").stat().st_mtime_ns
    (out / "imagesTr/s_1.nii.gz").unlink()
    fetch("msd-spleen", out, quiet)
    assert (out / "imagesTr/s_1.nii.gz").read_bytes() == spleen["Task09_Spleen/imagesTr/s_1.nii.gz"]
    assert (out / "imagesTr/s_2.nii.gz").stat().st_mtime_ns == kept

    # killed after it was recorded, before it was removed
    (out / "downloads/Task09_Spleen.tar").write_bytes(b"archive")
    record = json.loads((out / ".fetched.json").read_text())
    (out / ".fetched.json").write_text(json.dumps(record | {"complete": False}))
    fetch("msd-spleen", out, quiet)
    assert not list((out / "downloads").iterdir())

    with pytest.raises(UserError, match="holds another data set"):
        fetch("msd-heart", out, quiet)


def test_killed_at_any_moment_the_same_command_ends_with_the_same_files(archives, spleen, tmp_path):
    archives.cut, archives.cut_at = 10**6, 700
    code = f"""
    from pathlib import Path
    from unetrkit.fetch import catalogue, download
    from unetrkit.fetch.run import fetch
    download.FIRST_WAIT = 0.001
    catalogue.DATASETS["msd-spleen"] = {catalogue.DATASETS["msd-spleen"]!r}
    print("begun", flush=True)
    fetch("msd-spleen", Path({str(tmp_path / "out")!r}), lambda *_: None)
    """
    code = code.replace("Published(", "catalogue.Published(")
    chance = random.Random(1)
    for _ in range(4):
        words = [sys.executable, "-c", textwrap.dedent(code)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for file in (tmp_path / "out").rglob("*.nii.gz"):  # never half of one
            assert file.read_bytes() == spleen[f"Task09_Spleen/{file.relative_to(tmp_path / 'out')}"]
    archives.cut = 0
    fetch("msd-spleen", tmp_path / "out", quiet)
    for name, content in spleen.items():
        if "._" not in name:
            assert (tmp_path / "out" / name.removeprefix("Task09_Spleen/")).read_bytes() == content


def zenodo(archives: Archives, record: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        archives.files[f"/files/{name}"] = content
    listed = [
        {
            "key": name,
            "size": len(content),
            "checksum": f"md5:{md5(content)}",
            "links": {"self": f"{archives.url}/files/{name}"},
        }
        for name, content in files.items()
    ]
    archives.answers[f"/zenodo/{record}"] = lambda query, body: {"files": listed}


def test_amos_has_a_list_for_each_modality(archives, tmp_path):
    files = {
        f"amos22/{kind}{split}/amos_{number:04d}.nii.gz": scan(number)
        for split, numbers in (("Tr", (1, 4, 507)), ("Va", (8, 510)), ("Ts", (2, 600)))
        for number in numbers
        for kind in ("images", "labels")
        if kind == "images" or split != "Ts"
    }
    zenodo(archives, "7262581", {"amos22.zip": zip_of(files | {"amos22/dataset.json": b"{}"})})
    dataset = read_dataset(fetch("amos", tmp_path, quiet, hosts(archives)))
    assert [(case.name[-1], case.split) for case in dataset.cases] == [
        ("1", "training"), ("4", "training"), ("8", "validation"), ("2", "test"),
    ]  # fmt: skip
    assert dataset.labels[15] == "prostate or uterus" and len(dataset.labels) == 16
    assert len(read_dataset(tmp_path / "dataset_mr.json").cases) == 3


def test_luna16_has_its_ten_subsets_as_folds(archives, tmp_path):
    subsets = {
        f"subset{k}.zip": zip_of(
            {f"subset{k}/1.3.{k}.mhd": b"ObjectType = Image", f"subset{k}/1.3.{k}.raw": b"0"}
        )
        for k in range(10)
    }
    zenodo(
        archives, "3723295", {name: subsets[name] for name in sorted(subsets)[:7]} | {"annotations.csv": b"x"}
    )
    zenodo(archives, "4121926", {name: subsets[name] for name in sorted(subsets)[7:]})
    archives.cut, archives.cut_at = 3, 50
    dataset = read_dataset(fetch("luna16", tmp_path, quiet, hosts(archives)))
    assert [case.fold for case in dataset.cases] == list(range(10))
    assert "/files/annotations.csv" not in {path for path, _ in archives.asked}


@pytest.fixture
def lidc(archives, tmp_path):
    """NBIA with eleven subjects, one of which is a localizer and one a series with a missing slice."""
    rows = []
    archives.answers["/nbia/getImageWithMD5Hash"] = lambda query, body: ZIPS[query["SeriesInstanceUID"][0]]
    for k in range(12):
        uid = f"1.2.{k}"
        slices = write_series(tmp_path / f"dicom{k}", SeriesInstanceUID=uid, PatientID=f"LIDC-IDRI-{k:04d}")
        for n, file in enumerate(slices):
            file.rename(file.with_name(f"1-{n:03d}.dcm"))
        if k == 3:
            (tmp_path / "dicom3" / "1-002.dcm").unlink()
        files = {file.name: file.read_bytes() for file in sorted((tmp_path / f"dicom{k}").iterdir())}
        sums = "".join(f"{name},{md5(content)}\n" for name, content in files.items())
        archives.answers.setdefault(
            "/nbia/getImageWithMD5Hash", lambda query, body: ZIPS[query["SeriesInstanceUID"][0]]
        )
        ZIPS[uid] = zip_of(files | {"md5hashes.csv": sums.encode(), "LICENSE": b"CC BY 3.0"})
        count = 2 if k == 5 else 10
        rows.append({"SeriesInstanceUID": uid, "PatientID": f"LIDC-IDRI-{k:04d}", "ImageCount": count})
    archives.answers["/nbia/getSeries"] = lambda query, body: (
        rows if query["Collection"] == ["LIDC-IDRI"] else b""
    )
    return rows


ZIPS: dict[str, bytes] = {}


def test_dicom_series_become_nifti_and_subjects_stay_apart(archives, lidc, tmp_path):
    from unetrkit.data.volume import read_image

    out = tmp_path / "lidc"
    dataset = read_dataset(fetch("lidc", out, quiet, hosts(archives)))
    assert [case.split for case in dataset.cases] == ["training"] * 9 + ["validation"]
    refused = json.loads((out / "refused.json").read_text())
    assert list(refused) == ["1.2.3"] and "misses 1 slice" in refused["1.2.3"]
    first = read_image(list(dataset.cases[0].images))
    original = read_image([tmp_path / "dicom0"])
    np.testing.assert_array_equal(first.array, original.array)
    np.testing.assert_allclose(first.affine, original.affine, atol=1e-5)
    assert nib.load(dataset.cases[0].images[0]).get_data_dtype() == np.int16
    assert sorted(p.name for p in out.iterdir()) == [".fetch.lock", "dataset.json", "images", "refused.json"]

    archives.asked.clear()
    dataset.cases[4].images[0].unlink()
    fetch("lidc", out, quiet, hosts(archives))
    assert [path for path, _ in archives.asked] == ["/nbia/getSeries", "/nbia/getImageWithMD5Hash"]


@pytest.mark.parametrize("answer", [{"error": "busy"}, ["a"], [{"ImageCount": "many"}], [{"ImageCount": 20}]])
def test_an_answer_that_lists_no_series(archives, tmp_path, answer):
    archives.answers["/nbia/getSeries"] = lambda query, body: answer
    with pytest.raises(UserError, match="is no list of series"):
        fetch("lidc", tmp_path, quiet, hosts(archives))


def test_a_series_that_is_cut_is_asked_for_again(archives, lidc, tmp_path):
    uid, answers = lidc[0]["SeriesInstanceUID"], []

    def cut_once(query, body):
        content = ZIPS[query["SeriesInstanceUID"][0]]
        answers.append(query["SeriesInstanceUID"][0])
        return content[:500] if len(answers) == 1 else content

    archives.answers["/nbia/getImageWithMD5Hash"] = cut_once
    fetch("lidc", tmp_path / "lidc", quiet, hosts(archives))
    assert answers[:2] == [uid, uid] and len(answers) == 12


def test_a_slice_that_is_damaged_on_its_way_is_refused_and_named(archives, lidc, tmp_path):
    uid = lidc[0]["SeriesInstanceUID"]
    whole = ZIPS[uid]
    ZIPS[uid] = zip_of({"1-000.dcm": b"something else", "md5hashes.csv": f"1-000.dcm,{md5(b'?')}".encode()})
    with pytest.raises(UserError, match=rf"the series {uid} arrived with 1 slice"):
        fetch("lidc", tmp_path / "lidc", quiet, hosts(archives))
    assert not list((tmp_path / "lidc" / "images").iterdir())
    ZIPS[uid] = whole
    fetch("lidc", tmp_path / "lidc", quiet, hosts(archives))


def test_a_restricted_collection_says_where_to_ask_and_takes_what_was_downloaded_by_hand(
    archives, lidc, tmp_path
):
    with pytest.raises(UserError, match="TCIA lists no series of `hnscc`") as caught:
        fetch("hnscc", tmp_path / "hnscc", quiet, hosts(archives))
    assert "downloads" in caught.value.hint
    (tmp_path / "hnscc/downloads").mkdir()
    for k in (0, 1):
        (tmp_path / f"dicom{k}").rename(tmp_path / f"hnscc/downloads/series{k}")
    assert len(read_dataset(fetch("hnscc", tmp_path / "hnscc", quiet, hosts(archives))).cases) == 2


def test_covid_has_the_split_of_the_vit_pretraining(tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded by a program") as caught:
        fetch("tcia-covid19", tmp_path, quiet)
    assert "Aspera" in caught.value.hint
    from importlib import resources

    held_out = (resources.files("unetrkit.fetch") / "tcia_covid19_validation.txt").read_text().split()
    assert len(held_out) == len(set(held_out)) == 171 and {"0424", "0552", "0028_0"} <= set(held_out)
    folder = tmp_path / "downloads/CT-Covid-19"
    folder.mkdir(parents=True)
    names = held_out + [f"{9000 + k}" for k in range(600)]
    for name in names[:-3]:
        (folder / f"volume-covid19-A-{name}.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 597 \+ 171 scans"):
        fetch("tcia-covid19", tmp_path, quiet)
    # the rest comes in an archive
    rest = zip_of({f"more/volume-covid19-A-{name}.nii.gz": b"" for name in names[-3:]})
    (tmp_path / "downloads/more.zip").write_bytes(rest)
    dataset = read_dataset(fetch("tcia-covid19", tmp_path, quiet))
    assert [sum(case.split == s for case in dataset.cases) for s in ("training", "validation")] == [600, 171]


@pytest.fixture
def synapse(archives, monkeypatch):
    """Synapse's calls for the file of BTCV, for a user with the token `secret`."""
    if not find_spec("synapseclient"):
        pytest.skip("synapseclient is not installed")
    names = [("Training/img/img", k) for k in (*range(1, 11), *range(21, 41))]
    names += [("Training/label/label", k) for k in (*range(1, 11), *range(21, 41))]
    names += [("Testing/img/img", k) for k in range(61, 81)]
    content = zip_of({f"RawData/{start}{k:04d}.nii.gz": scan(k) for start, k in names})
    archives.files["/signed/RawData.zip"] = content
    handle = {"fileName": "RawData.zip", "contentMd5": md5(content), "contentSize": len(content)}
    archives.answers |= {
        "/auth/v1/userProfile": lambda query, body: {"ownerId": "1", "userName": "somebody"},
        "/repo/v1/userProfile": lambda query, body: {"ownerId": "1", "userName": "somebody"},
        "/repo/v1/entity/syn3379050": lambda query, body: {"id": "syn3379050", "dataFileHandleId": "7"},
        "/file/v1/fileHandle/batch": lambda query, body: {
            "requestedFiles": [{"fileHandle": handle, "preSignedURL": f"{archives.url}/signed/RawData.zip"}]
        },
    }
    monkeypatch.setenv("SYNAPSE_AUTH_TOKEN", "secret-token")
    return archives


@pytest.mark.filterwarnings("ignore")  # of the client itself
def test_btcv_by_its_own_client_with_the_published_splits(synapse, tmp_path, capsys):
    synapse.cut, synapse.cut_at = 2, 3000
    dataset = read_dataset(fetch("btcv", tmp_path, quiet, hosts(synapse)))
    names = [case.name for case in dataset.cases if case.split == "training"]
    assert names == [f"img{k:04d}" for k in (*range(1, 11), *range(21, 35))]
    assert [case.name for case in dataset.cases if case.split == "validation"] == [
        f"img{k:04d}" for k in range(35, 41)
    ]
    assert sum(case.split == "test" for case in dataset.cases) == 20 and len(dataset.labels) == 14
    for count in (3, 5, 6, 7, 12):
        few = read_dataset(tmp_path / f"dataset_first{count}.json")
        assert [case.name for case in few.cases if case.split == "training"] == names[:count]
    printed = capsys.readouterr()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.suffix == ".json")
    assert "secret" not in printed.out + printed.err and b"secret" not in written
    synapse.asked.clear()
    fetch("btcv", tmp_path, quiet, hosts(synapse))
    assert not synapse.asked


@pytest.mark.filterwarnings("ignore")
def test_btcv_without_a_registration_says_where_and_how(synapse, tmp_path, monkeypatch):
    synapse.answers["/file/v1/fileHandle/batch"] = lambda query, body: {
        "requestedFiles": [{"failureCode": "UNAUTHORIZED"}]
    }
    with pytest.raises(UserError, match="UNAUTHORIZED") as caught:
        fetch("btcv", tmp_path, quiet, hosts(synapse))
    assert "syn3193805" in caught.value.hint and "SYNAPSE_AUTH_TOKEN" in caught.value.hint
    monkeypatch.delenv("SYNAPSE_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="knows no user") as caught:
        fetch("btcv", tmp_path, quiet, hosts(synapse))
    assert "register at" in caught.value.hint


@pytest.mark.filterwarnings("ignore")
def test_btcv_without_a_connection_says_so(synapse, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RETRIES", 0)
    nowhere = Hosts(synapse="http://127.0.0.1:9/")
    with pytest.raises(UserError, match="Synapse gives no answer about `btcv`") as caught:
        fetch("btcv", tmp_path, quiet, nowhere)
    synapse.refuse["/repo/v1/entity/syn3379050"] = 500
    with pytest.raises(UserError, match="Synapse gives no answer about `btcv`"):
        fetch("btcv", tmp_path, quiet, hosts(synapse))
    assert "secret" not in caught.value.message + caught.value.hint


def test_btcv_without_the_client_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "synapseclient", None)
    with pytest.raises(UserError, match="needs the `fetch` extra"):
        fetch("btcv", tmp_path, quiet)


def test_an_unknown_name_and_the_table(capsys):
    with pytest.raises(UserError, match="no data set `msd-spleeen`") as caught:
        fetch("msd-spleeen", Path("x"), quiet)
    assert caught.value.hint == "did you mean `msd-spleen`?"
    table = catalogue.catalogue().splitlines()
    assert len(table) == 17
    assert [line.split()[0] for line in table if "registration" in line] == ["btcv", "tcia-covid19", "hnscc"]
