"""Manifests whose numbers and names no writer writes, with the right `check`."""

import pytest
from test_manifest import FIELDS, changed, seal

from knnstore.errors import DamageError
from knnstore.storage.manifest_json import parse_manifest


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("snapshot", 0),
        ("snapshot", 10**17 + 1),
        ("parent.snapshot", 0),
        ("key.dim", 0),
        ("checkpoint.vocab_size", 0),
        ("windows.stride", 0),
        ("windows.context", 1 << 31),
        ("spaces.0.distortion", -0.5),
        ("spaces.0.n_sub", 1 << 21),
        ("spaces.0.rotation", "sideways"),
        ("spaces.0.files", {"lists.bin": {"sha256": "00" * 32, "size": 1}}),
        ("coarse.0.nlist", 0),
        ("segments.0.content.entries", 0),
        ("segments.0.content.documents", 0),
        ("segments.0.content.documents", 101),
        ("segments.0.content.distortion", 1e39),
        ("segments.0.content.distortion", -1e-9),
        ("segments.0.dead", [[5, 5]]),
        ("segments.0.dead", [[9, 5]]),
        ("segments.0.dead", [[0, 5], [5, 7]]),
        ("segments.0.dead", [[0, 5], [3, 7]]),
        ("segments.0.dead", [[6, 7], [0, 5]]),
        ("calibration.weights.law", -0.5),
        ("calibration.weights", {"law": None}),
        ("calibration.gate.kind", "sideways"),
        ("calibration.gate.kind", "logistic"),
        ("calibration.gate.distances", [1.5]),
        ("calibration.gate.distances", [20.5, 1.5]),
        ("calibration.gate.distances", [1.5, 1.5]),
        ("calibration.gate.distances", [-1.5, 1.5]),
        ("calibration.gate.lambdas", [0.75, 1.5]),
        ("calibration.gate.lambdas", [-0.25, 0.0]),
        ("calibration.gate", {"kind": "distance", "distances": [], "lambdas": []}),
        ("calibration.gate", {}),
        ("calibration.before.weights", [0.5, 0.5]),
        ("calibration.before.weights", ["x"]),
        ("calibration.before", {"kind": "logistic", "features": ["lm_max", "lm_max"], "weights": [1.0, 2.0], "bias": 0.0}),
        ("segments.1", FIELDS["segments"][0]),
        ("spaces.1", FIELDS["spaces"][0]),
    ],
)
def test_numbers_and_names_that_no_writer_writes(at, value):
    """Each number is in the range that it can have, ranges are as they are written, and nothing is listed twice."""
    place = tuple(int(name) if name.isdigit() else name for name in at.split("."))
    with pytest.raises(DamageError, match=r"m[.:\[]"):
        parse_manifest(seal(changed(FIELDS, place, value)), "m")
