"""Many requests on the TensorRT backend, over fakes of tensorrt and the driver: every one gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from batching import alone, check_alike, examples, plans, play
from hypothesis import HealthCheck, given, settings
from test_trt import BATCH, CAPACITY, CHUNK, build  # noqa: F401 - a fixture

from sessa_deploy.runtime.batcher import Batcher


@pytest.mark.parametrize("build", ["10.9.0"], indirect=True)
@pytest.mark.parametrize("every", [False, True])
def test_every_request_gets_what_it_gets_alone(build: Callable[..., Any], every: bool) -> None:  # noqa: F811
    backend, _, _ = build("fp32", every)

    @settings(max_examples=examples(4), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(plans(257, CAPACITY, most=5, tokens=6))
    def property(requests):
        def make() -> Batcher:
            return Batcher(backend, None, CHUNK, queue=99)

        for plan, found in zip(requests, play(make(), requests), strict=True):
            check_alike(found, alone(make, plan.request), plan, 1e-4)

    property()
    assert backend.batch == BATCH
