"""A calibration: how much weight the neighbours get, and what that was fitted for. Records, and their JSON in a manifest."""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from knnstore.errors import DamageError
from knnstore.storage.parse import (
    parse_flag,
    parse_hex,
    parse_list,
    parse_mapping,
    parse_number,
    parse_object,
    parse_size,
    parse_text,
    parse_word,
)

__all__ = ["BY_DISTANCE", "LOGISTIC", "Calibration", "Gate", "calibration_fields", "parse_calibration"]

CALIBRATION_STATES = ("fresh", "stale", "default")
BY_DISTANCE, LOGISTIC = "distance", "logistic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """How λ follows from a query and its neighbours.

    kind "distance": λ between the points (distances, lambdas), the first squared L2 of the nearest neighbour and ascending; as at
    the first or last point outside of them. kind "logistic": λ = sigmoid(bias + sum of weights * features), features by name.
    """

    kind: str
    distances: tuple[float, ...] = ()
    lambdas: tuple[float, ...] = ()
    features: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    bias: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """λ and temperature, and what they hold for.

    lmbda: where there is no gate. temperature: in units of squared distance. status: `fresh`, `stale` (the store changed since) or
    `default` (too little text to fit on). made_by: the command. tokens: how many it was fitted on. perplexity: {lm, knn, mixed} on
    those, or empty. gate: λ of each query, None for lmbda everywhere. before: how probable it is, by the LM alone, that a search pays.
    weights: of domains; one that is not named has 1.
    """

    lmbda: float
    temperature: float
    k: int
    nprobe: int
    exact: bool
    spaces: tuple[str, ...]
    domains: tuple[str, ...]
    status: str
    made_by: str
    tokens: int
    perplexity: dict[str, float]
    gate: Gate | None = None
    before: Gate | None = None
    weights: dict[str, float] = field(default_factory=dict)


def calibration_fields(calibration: Calibration) -> dict[str, Any]:
    """A calibration as it stands in a manifest. Gates and weights that there are not are left out."""
    fields = dataclasses.asdict(calibration)
    fields["lambda"] = fields.pop("lmbda")
    for name in ("gate", "before"):
        gate = getattr(calibration, name)
        if gate is None:
            del fields[name]
        else:
            fields[name] = {part: fields[name][part] for part in ("kind", *_PARTS[gate.kind])}
    if not calibration.weights:
        del fields["weights"]
    return fields


_PARTS = {BY_DISTANCE: ("distances", "lambdas"), LOGISTIC: ("features", "weights", "bias")}


def parse_calibration(raw: object, at: str) -> Calibration | None:
    """A manifest's calibration. Raises DamageError."""
    if raw is None:
        return None
    names = (
        "domains", "exact", "k", "lambda", "made_by", "nprobe", "perplexity", "spaces", "status", "temperature", "tokens",
    )  # fmt: skip
    fields = parse_object(raw, at, required=names, optional=("before", "gate", "weights"))
    scores = parse_object(fields["perplexity"], f"{at}.perplexity", required=(), optional=("lm", "knn", "mixed"))
    weights = {} if fields["weights"] is None else parse_mapping(fields["weights"], f"{at}.weights")
    return Calibration(
        lmbda=parse_number(fields["lambda"], f"{at}.lambda"),
        temperature=parse_number(fields["temperature"], f"{at}.temperature"),
        k=parse_size(fields["k"], f"{at}.k"),
        nprobe=parse_size(fields["nprobe"], f"{at}.nprobe"),
        exact=parse_flag(fields["exact"], f"{at}.exact"),
        spaces=tuple(parse_hex(item, f"{at}.spaces", 32) for item in parse_list(fields["spaces"], f"{at}.spaces")),
        domains=tuple(parse_text(item, f"{at}.domains") for item in parse_list(fields["domains"], f"{at}.domains")),
        status=parse_word(fields["status"], f"{at}.status", CALIBRATION_STATES),
        made_by=parse_text(fields["made_by"], f"{at}.made_by"),
        tokens=parse_size(fields["tokens"], f"{at}.tokens"),
        perplexity={name: parse_number(score, f"{at}.perplexity.{name}") for name, score in scores.items() if score is not None},
        gate=_parse_gate(fields["gate"], f"{at}.gate"),
        before=_parse_gate(fields["before"], f"{at}.before"),
        weights={name: parse_number(weight, f"{at}.weights.{name}", least=0.0) for name, weight in weights.items()},
    )


def _parse_gate(raw: object, at: str) -> Gate | None:
    if raw is None:
        return None
    kind = parse_word(parse_mapping(raw, at).get("kind"), f"{at}.kind", tuple(_PARTS))
    fields = parse_object(raw, at, required=("kind", *_PARTS[kind]))
    if kind == BY_DISTANCE:
        distances = _numbers(fields["distances"], f"{at}.distances", least=0.0)
        lambdas = _numbers(fields["lambdas"], f"{at}.lambdas", least=0.0, most=1.0)
        if not distances or len(distances) != len(lambdas) or any(a >= b for a, b in pairwise(distances)):
            raise DamageError(f"{at}: its distances do not ascend, or are not as many as its lambdas. Run `knnstore verify`.")
        return Gate(kind=kind, distances=distances, lambdas=lambdas)
    features = tuple(parse_text(item, f"{at}.features") for item in parse_list(fields["features"], f"{at}.features"))
    weights = _numbers(fields["weights"], f"{at}.weights")
    if len(weights) != len(features) or len(set(features)) != len(features):
        raise DamageError(f"{at}: its weights are not one for each feature. Run `knnstore verify`.")
    return Gate(kind=kind, features=features, weights=weights, bias=parse_number(fields["bias"], f"{at}.bias"))


def _numbers(raw: object, at: str, **bounds: float) -> tuple[float, ...]:
    return tuple(parse_number(item, at, **bounds) for item in parse_list(raw, at))
