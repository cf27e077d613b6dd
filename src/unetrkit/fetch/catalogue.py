"""The public data sets of the UNETR family: where each is, under which licence, and who has to register."""

from dataclasses import dataclass
from typing import Literal

from unetrkit.errors import UserError, nearest

Source = Literal["https", "synapse", "zenodo", "nbia", "by hand"]
Arrangement = Literal["decathlon", "btcv", "amos", "luna16", "tcia-covid19", "subjects"]

MSD = "https://msd-for-monai.s3-us-west-2.amazonaws.com/"
ZENODO = "https://zenodo.org/api/records/"
NBIA = "https://nbia.cancerimagingarchive.net/nbia-api/services/v4/"
SYNAPSE = "https://www.synapse.org/Synapse:syn3193805"
COVID = "https://www.cancerimagingarchive.net/collection/ct-images-in-covid-19/"
LUNA = "https://luna16.grand-challenge.org/Download/"
AMOS = "https://zenodo.org/records/7262581"


@dataclass(frozen=True)
class Published:
    """A data set. what: URLs with their MD5 (https), entities (synapse), records and the names of their files
    (zenodo), collections (nbia). size_gb: of the download, to plan a disk with."""

    name: str
    what: tuple[tuple[str, str], ...]
    source: Source
    arrangement: Arrangement
    size_gb: float
    licence: str
    page: str
    # what a user must do first; empty where anybody may download
    first: str = ""


TOKEN = (
    f"register at {SYNAPSE}, join the challenge there, then make a token with `view` and `download` at "
    "https://www.synapse.org/PersonalAccessTokens:0 and put it into SYNAPSE_AUTH_TOKEN or ~/.synapseConfig"
)
FACES = (
    "heads show faces: ask for access as its page says, download it with the NBIA Data Retriever into "
    "`downloads` in the folder, and run the command again"
)
ASPERA = (
    "TCIA gives its NIfTI files out through IBM Aspera only: download them from its page into `downloads` in "
    "the folder, and run the command again"
)

# the MD5 sums are those that MONAI's DecathlonDataset checks against
_TASKS = (
    ("brain-tumour", "Task01_BrainTumour", "240a19d752f0d9e9101544901065d872", 7.1),
    ("heart", "Task02_Heart", "06ee59366e1e5124267b774dbd654057", 0.5),
    ("liver", "Task03_Liver", "a90ec6c4aa7f6a3d087205e23d4e6397", 27),
    ("hippocampus", "Task04_Hippocampus", "9d24dba78a72977dbd1d2e110310f31b", 0.03),
    ("prostate", "Task05_Prostate", "35138f08b1efaef89d7424d2bcc928db", 0.2),
    ("lung", "Task06_Lung", "8afd997733c7fc0432f71255ba4e52dc", 8.5),
    ("pancreas", "Task07_Pancreas", "4f7080cfca169fa8066d17ce6eb061e4", 11.5),
    ("hepatic-vessel", "Task08_HepaticVessel", "641d79e80ec66453921d997fbf12a29c", 8.7),
    ("spleen", "Task09_Spleen", "410d4a301da4e5b2f6f86ec3ddba524e", 1.5),
    ("colon", "Task10_Colon", "bad7a188931dc2f6acf72b08eb6202d0", 5.8),
)


def _collection(name: str, collection: str, size_gb: float, page: str, first: str = "") -> Published:
    licence = "CC BY 3.0" if not first else "TCIA restricted"
    page = f"https://www.cancerimagingarchive.net/collection/{page}/"
    return Published(name, ((collection, "CT"),), "nbia", "subjects", size_gb, licence, page, first)


def _decathlon(organ: str, task: str, md5: str, size_gb: float) -> Published:
    what = ((f"{MSD}{task}.tar", f"md5:{md5}"),)
    page = "http://medicaldecathlon.com"
    return Published(f"msd-{organ}", what, "https", "decathlon", size_gb, "CC BY-SA 4.0", page)


_BTCV = (("syn3379050", ""),)
_LUNA = (("3723295", "subset"), ("4121926", "subset"))
DATASETS = {
    one.name: one
    for one in (
        Published("btcv", _BTCV, "synapse", "btcv", 1.6, "terms of the challenge", SYNAPSE, TOKEN),
        Published("tcia-covid19", (), "by hand", "tcia-covid19", 12, "CC BY 4.0", COVID, ASPERA),
        Published("luna16", _LUNA, "zenodo", "luna16", 67, "CC BY 4.0", LUNA),
        _collection("lidc", "LIDC-IDRI", 128, "lidc-idri"),
        _collection("hnscc", "HNSCC", 1300 * 0.15, "hnscc", FACES),
        _collection("colonography", "CT COLONOGRAPHY", 497, "ct-colonography"),
        Published("amos", (("7262581", "amos22.zip"),), "zenodo", "amos", 24, "CC BY 4.0", AMOS),
        *(_decathlon(*task) for task in _TASKS),
    )
}


def published(name: str) -> Published:
    """A data set by its name. Raises UserError for any other.

    >>> published("msd-spleen").licence
    'CC BY-SA 4.0'
    """
    if name not in DATASETS:
        raise UserError(f"there is no data set `{name}`", hint=nearest(name, DATASETS))
    return DATASETS[name]


def catalogue() -> str:
    """A line for each data set: name, size, licence, and whether a user has to do something first."""
    rows = []
    for one in DATASETS.values():
        first = "registration" if one.first else ""
        rows.append(f"{one.name:19} {one.size_gb:6.2f} GB  {one.licence:22} {first:12}  {one.page}")
    return "\n".join(rows)
