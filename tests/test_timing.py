"""Timing of fake compiled functions, with made-up clock times."""

from types import SimpleNamespace

from trimask.scripts.benchmarks.timing import timed


def test_functions_are_called_in_turn_after_a_call_that_does_not_count(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("jax.block_until_ready", lambda name: calls.append(f"{name} is there"))

    def takes(*seconds: float):
        """Fake compiled function: seconds that compiling takes, then seconds of each call."""
        left = list(seconds)

        def run(name):
            clock[0] += left.pop(0)
            calls.append(name)
            return name

        def compiled():
            clock[0] += left.pop(0)
            run.memory_analysis = lambda: None
            return run

        return SimpleNamespace(lower=lambda name: SimpleNamespace(compile=compiled))

    functions = {"a": (takes(5.0, 100.0, 1.0, 2.0, 9.0), ("a",)), "b": (takes(7.0, 0.0, 4.0, 3.0, 3.0), ("b",))}
    found = timed(functions, repeats=3)
    assert calls == ["a", "a is there", "b", "b is there"] * 4
    assert {name: (t.seconds, t.compile_seconds) for name, t in found.items()} == {"a": (2.0, 5.0), "b": (3.0, 7.0)}
    assert found["a"].temporary_bytes is None
