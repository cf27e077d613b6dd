"""What a launch of a training is told, read before anything is sent anywhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unetrkit.config import load_recipe
from unetrkit.data.remote import url_of
from unetrkit.errors import UserError
from unetrkit.pretraining.run import PretrainSettings, pretrain
from unetrkit.training.run import TrainSettings, train

KINDS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "train": (TrainSettings, train),
    "pretrain": (PretrainSettings, pretrain),
}


def read(words: Sequence[str]) -> Any:
    """The settings of `train RECIPE KEY=VALUE …`. Raises UserError for others, and for a key in a URL."""
    if words[0] not in KINDS or len(words) == 1:
        hint = "as in `unetrkit launch ray -- train swin_unetr_base data=store out=run`"
        raise UserError("the processes `train` or `pretrain` a recipe", hint=hint)
    settings = load_recipe(KINDS[words[0]][0], words[1], words[2:])
    for value in dict(settings).values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Path):
                url_of(one)
    return settings
