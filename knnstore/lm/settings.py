"""How neighbours are searched and mixed in: what the caller says, and for the rest what the calibration says."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from knnstore import filters
from knnstore.errors import InvalidArgumentError
from knnstore.format import Codec
from knnstore.lm.distribution import check_lambda, check_temperature
from knnstore.search import check_breadth
from knnstore.storage.calibration import Calibration, Gate
from knnstore.store import Datastore

__all__ = ["RETRIEVALS", "Settings", "settings_of"]

RETRIEVALS = ("full", "pointers", "confident")
MIN_KNNS = 4  # pointers: with fewer left of a step's neighbours, the next step is searched (docs/evaluation.md)
THRESHOLD = 0.25  # confident: how probable it must be that a search pays; higher ones save more, and cost more


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How neighbours are searched and mixed in.

    gate: λ of each query; None for lmbda everywhere. before: how probable it is, by the LM alone, that a search pays; for retrieval
    `confident`. domains: weights of those that are searched, None for all at weight 1. retrieval: `full`, `pointers` or `confident`.
    min_knns, threshold: of the last two.
    """

    k: int
    nprobe: int
    lmbda: float
    temperature: float
    gate: Gate | None = None
    before: Gate | None = None
    domains: Mapping[str, float] | None = None
    exclude: tuple[str | filters.RowRange, ...] = ()
    exact: bool = False
    retrieval: str = "full"
    min_knns: int = MIN_KNNS
    threshold: float = THRESHOLD


def settings_of(
    store: Datastore,
    *,
    k: int | None = None,
    nprobe: int | None = None,
    lmbda: float | None = None,
    temperature: float | None = None,
    domains: filters.Domains | None = None,
    exclude: str | filters.RowRange | Iterable[str | filters.RowRange] | None = None,
    exact: bool = False,
    retrieval: str = "full",
    min_knns: int | None = None,
    threshold: float | None = None,
) -> Settings:
    """What is None comes from the calibration; T = 1 is measured to do harm, so there is no constant to fall back to.

    A λ that is given holds everywhere: no gate. What can be checked is checked here: a model may take long to load. Warns where the
    calibration may not fit the search. Raises InvalidArgumentError, NotFoundError.
    """
    calibration = store.manifest.calibration
    if calibration is None and (lmbda is None or temperature is None):
        raise InvalidArgumentError(f"{store.path}: it has no calibration, so λ and temperature must be given (lmbda=, temperature=).")
    defaults = calibration or store.manifest
    k, nprobe = defaults.k if k is None else k, defaults.nprobe if nprobe is None else nprobe
    check_breadth(k, nprobe)
    weights = filters.domain_weights(store.segments, domains)
    if exact:
        for segment in store.segments:
            segment.check_exact()
    gate = before = None
    if calibration is not None:
        if lmbda is None or temperature is None:
            _warn_if_unfit(store, calibration, k=k, nprobe=nprobe, exact=exact)
        gate, before = (calibration.gate if lmbda is None else None), calibration.before
        lmbda = calibration.lmbda if lmbda is None else lmbda
        temperature = calibration.temperature if temperature is None else temperature
        if domains is None and calibration.weights:
            weights = {name: calibration.weights.get(name, 1.0) for name in store.domains}
    if retrieval not in RETRIEVALS:
        raise InvalidArgumentError(f"retrieval {retrieval!r}: use {', '.join(RETRIEVALS)}.")
    if retrieval == "confident" and before is None:
        raise InvalidArgumentError(
            f"{store.path}: retrieval `confident` needs a gate that tells from the model alone whether a search is worth it. "
            "`knnstore tune` fits one."
        )
    min_knns, threshold = MIN_KNNS if min_knns is None else min_knns, THRESHOLD if threshold is None else threshold
    if min_knns < 1:
        raise InvalidArgumentError(f"min_knns {min_knns}: use 1 or more.")
    if not (math.isfinite(threshold) and 0.0 <= threshold <= 1.0):
        raise InvalidArgumentError(f"threshold {threshold}: use a number from 0 (search always) to 1 (never).")
    assert lmbda is not None, "refused above where there is none"
    return Settings(
        k=k,
        nprobe=nprobe,
        lmbda=check_lambda(lmbda),
        temperature=check_temperature(temperature),  # type: ignore[arg-type]  # likewise
        gate=gate,
        before=before,
        domains=weights,
        exclude=(exclude,) if isinstance(exclude, str | filters.RowRange) else tuple(exclude or ()),
        exact=exact,
        retrieval=retrieval,
        min_knns=min_knns,
        threshold=threshold,
    )


def _warn_if_unfit(store: Datastore, calibration: Calibration, *, k: int, nprobe: int, exact: bool) -> None:
    """Says where λ and temperature were fitted for another search, or another state of the datastore."""
    if calibration.status == "stale":
        warnings.warn(
            f"{store.path}: it changed after λ and temperature were fitted; they may not fit it any more. Fit them again with "
            "`knnstore tune`.",
            stacklevel=4,
        )
    if all(segment.space.codec is Codec.RAW for segment in store.segments):
        exact = calibration.exact  # their codes are the keys
    names = ("k", "nprobe", "exact")
    pairs = zip(names, (calibration.k, calibration.nprobe, calibration.exact), (k, nprobe, exact), strict=True)
    other = [f"{name} {fitted}, not {used}" for name, fitted, used in pairs if fitted != used]
    if other and calibration.status != "default":
        warnings.warn(f"{store.path}: λ and temperature were fitted for {' and '.join(other)}; they may not fit this search.", stacklevel=4)
