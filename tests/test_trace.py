"""mpisign.trace: spans, what they add up to, and what they say goes on."""

from __future__ import annotations

import time

import pytest
import torch

from mpisign.trace import PHASE_OF, PHASES, Tracer


def test_spans_in_the_order_in_which_they_ended() -> None:
    tracer = Tracer()
    before = time.perf_counter_ns()
    with tracer.stepping(7):
        with tracer.span("pack", 2):
            time.sleep(0.001)
        with tracer.span("phase 1"):
            pass
    with tracer.span("barrier()"), tracer.span("init()"):
        pass
    after = time.perf_counter_ns()
    spans = tracer.spans()
    assert [span[:3] for span in spans] == [
        ("pack", 7, 2),
        ("phase 1", 7, -1),
        ("init()", -1, -1),
        ("barrier()", -1, -1),
    ]
    assert all(before <= span.begin <= span.end <= after for span in spans)
    assert spans[0].end - spans[0].begin >= 1_000_000
    assert spans[3].begin <= spans[2].begin <= spans[2].end <= spans[3].end


def test_seconds_are_those_of_the_phases_since_a_mark() -> None:
    tracer = Tracer()
    with tracer.span("pack"):
        time.sleep(0.002)
    mark = tracer.mark()
    assert tracer.seconds(mark) == dict.fromkeys(PHASES, 0.0)
    for name in PHASE_OF:
        with tracer.span(name):
            time.sleep(0.001)
    with tracer.span("barrier()"):
        time.sleep(0.001)
    spans = tracer.spans(mark)
    assert [span.name for span in spans] == [*PHASE_OF, "barrier()"]
    for phase, seconds in tracer.seconds(mark).items():
        expected = sum(span.end - span.begin for span in spans if PHASE_OF.get(span.name) == phase)
        assert seconds == pytest.approx(expected * 1e-9)


def test_a_ring_keeps_the_latest() -> None:
    tracer = Tracer(capacity=4)
    for message in range(10):
        with tracer.span("pack", message):
            pass
    assert [span.message for span in tracer.spans()] == [6, 7, 8, 9]
    assert [span.message for span in tracer.spans(tracer.mark() - 2)] == [8, 9]
    assert tracer.spans(tracer.mark()) == []


def test_a_ring_of_another_size_keeps_the_latest_of_before() -> None:
    tracer = Tracer(capacity=4)
    for message in range(10):
        with tracer.span("pack", message):
            pass
    for capacity, kept in ((6, [6, 7, 8, 9]), (2, [8, 9])):
        tracer.keep(capacity)
        assert tracer.capacity == capacity
        assert [span.message for span in tracer.spans()] == kept
    mark = tracer.mark()
    for message in range(10, 15):
        with tracer.span("pack", message):
            pass
    assert [span.message for span in tracer.spans(mark)] == [13, 14]


def test_what_goes_on() -> None:
    tracer = Tracer()
    assert tracer.where() == ""
    with tracer.stepping(17):
        assert tracer.where() == ""
        with tracer.span("handshake"):
            assert tracer.where() == "step 17, handshake"
        with tracer.span("phase 2", 3):
            assert tracer.where() == "step 17, bucket 3, phase 2"
            with tracer.span("a comparison of layouts"):
                assert tracer.where() == "a comparison of layouts"
            assert tracer.where() == "step 17, bucket 3, phase 2"
    with tracer.span("barrier()"):
        assert tracer.where() == "barrier()"
    assert tracer.where() == ""


def test_an_exception_ends_a_span() -> None:
    tracer = Tracer()
    with pytest.raises(ValueError), tracer.stepping(3), tracer.span("pack"):
        raise ValueError
    assert [span.name for span in tracer.spans()] == ["pack"]
    assert tracer.where() == ""
    assert tracer.step == -1


def test_the_profiler_sees_phases_and_other_calls() -> None:
    tracer = Tracer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with tracer.span("phase 1"):
            pass
        with tracer.span("barrier()"):
            pass
    assert {"mpisign::exchange", "mpisign::barrier()"} <= {event.key for event in profile.key_averages()}
