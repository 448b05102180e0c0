"""The Hugging Face hub: the datasets of each family, and getting through to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ANSWER_SECONDS = 5
"""How long the hub may take to answer before the embedded data is used."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub; `configs` are read one after another (empty: the default one)."""

    path: str
    licence: str
    configs: tuple[str, ...] = ()


HUB = {
    "chat": (
        HubDataset("tatsu-lab/alpaca", "CC BY-NC 4.0"),
        HubDataset("databricks/databricks-dolly-15k", "CC BY-SA 3.0"),
    ),
    "code": (
        HubDataset("sahil2801/CodeAlpaca-20k", "CC BY-NC 4.0"),
        HubDataset("code-search-net/code_search_net", "various, by repository", ("python",)),
    ),
    "reasoning": (
        HubDataset("openai/gsm8k", "MIT", ("main",)),
        HubDataset(
            "EleutherAI/hendrycks_math",
            "MIT",
            (
                "algebra",
                "counting_and_probability",
                "geometry",
                "intermediate_algebra",
                "number_theory",
                "prealgebra",
                "precalculus",
            ),
        ),
    ),
}
"""The primary and the fallback dataset of each family."""


class Hub:
    """One attempt to use the hub; after a failure to connect it stays silent, so that one time-out is
    enough."""

    def __init__(self) -> None:
        self.unreachable: str | None = None

    def revision(self, path: str) -> tuple[str | None, str | None]:
        """The newest revision of a dataset and why there is none: one of the two is None.

        In offline mode (`HF_HUB_OFFLINE`) the revision is `cached` and the copy's name if this machine has
        one.
        """
        from datasets import config, load_dataset_builder
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        if self.unreachable:
            return None, self.unreachable
        if config.HF_HUB_OFFLINE:
            try:
                return f"cached {load_dataset_builder(path).cache_dir}", None
            except (OSError, ValueError) as error:
                return None, _line(error)
        try:
            return HfApi().dataset_info(path, timeout=ANSWER_SECONDS).sha, None
        except HfHubHTTPError as error:  # the hub answered: this dataset is the trouble
            return None, _line(error)
        except Exception as error:  # no connection, in one of the many ways the HTTP library says so
            self.unreachable = f"hub not reachable: {_line(error)}"
            return None, self.unreachable


def hub_rows(
    path: str, configs: tuple[str, ...], revision: str, streaming: bool, split: str = "train"
) -> Iterator[tuple[str, Any]]:
    """Rows of a hub dataset with their places; without streaming it is downloaded first."""
    from datasets import load_dataset

    pinned = {} if revision.startswith("cached") else {"revision": revision}
    for config in configs or (None,):
        dataset = load_dataset(path, config, split=split, streaming=streaming, **pinned)
        place = f"{path}/{config}" if config else path
        for number, row in enumerate(dataset, 1):
            yield f"{place}: row {number}", row


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
